"""Forwards of plugged layers that save activations or work: the same numbers as the plain forms."""
