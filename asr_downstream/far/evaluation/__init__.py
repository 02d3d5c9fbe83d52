"""Accuracy, cost and token relations of a teacher and its FAR family."""
