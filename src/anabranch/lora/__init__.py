"""Low-rank adapters: taken from a fine-tune, merged with each other, folded into their base."""
