"""Plugging: gates of an attention at the sites of a model, attached, described and recorded."""
