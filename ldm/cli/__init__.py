"""The command line: parse options, compose the config with Hydra, and explain errors to the user."""
