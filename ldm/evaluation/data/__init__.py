"""Data set reports: size, duplicates, balance and diversity."""
