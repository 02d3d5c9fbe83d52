"""What can be plugged, found out by doing it: `tools/backbones.py`."""
