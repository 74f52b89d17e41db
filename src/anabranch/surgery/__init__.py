"""What changes a model's structure: its tokenizer and the rows of its embeddings."""
