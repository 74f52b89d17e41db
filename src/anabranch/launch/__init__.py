"""Start commands and wait for them; know nothing of what is in them."""
