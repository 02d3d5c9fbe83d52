"""COCO scores, folded copies beside their originals, calibration, pictures, tables."""
