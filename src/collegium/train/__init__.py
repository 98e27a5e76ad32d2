"""The objective, the trainer and its checkpoints."""
