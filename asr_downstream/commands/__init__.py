"""The program `asr-downstream`: its table of commands, and those that serve all adapters; two have rooms."""
