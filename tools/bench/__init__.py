"""Benchmarks: paired in one run, ratios with their spread, no absolute times."""
