"""Sampling from runs; their metrics, tables and pictures."""
