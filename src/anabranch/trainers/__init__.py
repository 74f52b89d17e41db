"""Branches by other programs: any command, job files for axolotl and LLaMA-Factory, and checkpoints that come back."""
