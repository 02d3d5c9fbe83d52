"""Models, noise schedules and conditions of diffusers, built from configs."""
