"""The LSTMs that stand in for attention: form, execution, replacement, description."""
