"""Command-line scripts; each runs a function of ldm.commands."""
