"""Folding: constant gates become weights, exactly or by calibration, and models are compared."""
