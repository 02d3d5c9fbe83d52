"""Measurements of what attention does in a trained model: its gates, their correlation, noise, cost."""
