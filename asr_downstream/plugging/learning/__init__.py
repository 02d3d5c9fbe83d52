"""What a training changes: the parameters that learn, and the model in which all others stay as they are."""
