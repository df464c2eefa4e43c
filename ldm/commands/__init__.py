"""The functions behind the commands. Each script in tools/ calls one of these functions with a config."""
