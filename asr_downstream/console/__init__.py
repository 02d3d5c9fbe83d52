"""What programs share: command lines, progress, signals, text."""
