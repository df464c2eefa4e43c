"""The functions behind the commands; each script in tools/ calls one of them with its config."""
