"""Benchmarks that other programs run: commands for lmms-eval and VLMEvalKit, and their result files read into one table."""
