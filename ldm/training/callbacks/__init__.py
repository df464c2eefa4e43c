"""What happens around a step: guard, checkpoints, loggers, progress."""
