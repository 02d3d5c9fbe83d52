"""Forwards and backwards of attentions in few operators: the same numbers as the plain formulas."""
