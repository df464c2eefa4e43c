"""Errors addressed to the user."""


class UserError(ValueError):
    """Invalid input, explained in one paragraph: the input, the rule it breaks, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class InputError(UserError):
    """Error for an argument that breaks a rule.

    The message of `InputError("commitment", -1, "must be 0 or more")` is "commitment=-1 must be 0 or more." Library
    code does not know command-line options, so the command line later replaces the argument with the option that set
    it, and adds a remedy.

    Args:
        argument: Name of the argument.
        value: The invalid value.
        rule: The rule, as the end of the sentence without the full stop.
    """

    def __init__(self, argument: str, value: object, rule: str) -> None:
        self.argument, self.value, self.rule = argument, value, rule
        super().__init__(f"{argument}={value} {rule}.")

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str]]:
        return type(self), (self.argument, self.value, self.rule)  # errors from worker processes are pickled
