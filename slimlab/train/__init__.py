"""Training: objectives, optimizer, schedule, precision, loop, checkpoints, metrics."""
