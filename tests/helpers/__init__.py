"""Tiny models, data and programs that tests of several rooms use."""
