"""Pruning of hidden units: scores, and budgets of units, parameters or latency."""
