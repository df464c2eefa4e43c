"""The command line: composing, checking and explaining options. The home of Hydra."""
