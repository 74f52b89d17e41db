"""The best merge by measured score: a space of configs, a sampler, merges in memory, a journal, an honest verdict."""
