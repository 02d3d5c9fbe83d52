"""Whole detectors as one ONNX file: resizing, normalisation, the network, decoding, NMS."""
