"""Process-level tools: signals, ranks, devices, random numbers, paths and printable commands."""
