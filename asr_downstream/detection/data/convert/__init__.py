"""Data sets of other formats, converted to the COCO format beside their images."""
