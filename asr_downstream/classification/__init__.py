"""Training of image classifiers, stock or plugged: trained by the engine, folded, measured on images held out, shipped.

Needs what the engine needs, the extra ``far`` or ``diffusion``.
"""
