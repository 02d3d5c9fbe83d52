"""The machinery of `tools/setup_env.py`; the standard library is all that it needs."""
