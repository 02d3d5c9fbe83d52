"""Adapters: what gates, shifts and heads have learnt, beside a base that stays as it is."""
