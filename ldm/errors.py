"""The one error that a user is meant to read."""


class UserError(ValueError):
    """Bad input: one paragraph that names the input, the rule it breaks and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
