"""The process: signals, ranks, devices, random numbers, paths, commands as text."""
