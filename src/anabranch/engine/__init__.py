"""Reading checkpoints and streaming them through a merge method: files, order, casts. No formula stands here."""
