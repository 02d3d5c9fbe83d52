"""Distillation of the replaced attentions: what is compared, what learns, the stages."""
