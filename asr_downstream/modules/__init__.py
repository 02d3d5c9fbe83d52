"""For any module of torch: whether it can be plugged or folded, copies, nested values, and names of slots."""
