"""Command scripts: each names its function in ldm.commands."""
