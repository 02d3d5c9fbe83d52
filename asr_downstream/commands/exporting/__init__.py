"""Exporting folded models: what is exported, to which formats, and what proves that it computes the same."""
