"""The state of a training: its checkpoints, written and read back."""
