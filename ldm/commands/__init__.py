"""What each command does with its config; the scripts in tools/ name these functions."""
