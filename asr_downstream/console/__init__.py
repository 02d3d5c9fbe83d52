"""What programs share: command lines, progress, signals, text, and packages that import late."""
