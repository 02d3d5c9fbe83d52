"""What holds for any module of torch: whether it can be plugged or folded, and copies of it."""
