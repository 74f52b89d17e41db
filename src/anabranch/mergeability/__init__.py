"""Predict, before merging, which models merge well, with which method, and how sure that is (arXiv:2601.22285).

    metrics     what the metrics are: names, formulas (pure)       weights, data   feed them from checkpoints and rows
    measure     every pair of models -> metrics.json               table           CSV of pairs, metrics and outcomes
    published   the paper's rule and protocol (pure)               reproduce       both on the published tables
    predict     our rule: fit, interval, abstention (pure)         trial           what it is worth on tasks it never saw
    sets        from pairs to sets and methods (pure)              collect         make a table of one's own models
"""
