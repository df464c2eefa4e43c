"""Lightning callbacks and loggers: guard, checkpoints, metrics, progress and speed."""
