"""Files: written whole or not at all, weights, configs, locks and model cards."""
