"""A model with another model's tokenizer: which rows are the same token, how the others are made, what it costs in loss.

    matching        which donor token is which of the model's own
    trained         tokens that were hardly seen in training
    approximations  rows for tokens that the model does not have (pure)
    matrix          one embedding or head for the donor's tokenizer (pure)
    moving          files: two models in, one out
    text_loss       nats per byte of text, comparable across tokenizers
"""
