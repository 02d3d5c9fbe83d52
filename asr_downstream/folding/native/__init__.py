"""Removing the channel attention that models of other libraries have by themselves; see `fold_native`."""
