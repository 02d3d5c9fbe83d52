"""Detections in images that stand in no data set."""
