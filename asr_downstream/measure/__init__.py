"""What a model costs, how long a call takes, and where a number was measured."""
