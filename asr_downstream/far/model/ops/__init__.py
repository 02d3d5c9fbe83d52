"""The LSTMs of all heads as one operator in C++, for inference on the CPU: source, build, use."""
