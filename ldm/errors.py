"""The errors that a user is meant to read."""


class UserError(ValueError):
    """Bad input: one paragraph that names the input, the rule it breaks and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class InputError(UserError):
    """An argument that breaks a rule. The library knows neither the option that set it nor how to type another.

    `InputError("commitment", -1, "must be 0 or more")` reads "commitment=-1 must be 0 or more."; the command line puts
    the option in the argument's place, and adds the remedy.

    Args:
        argument: The name of the argument.
        value: What it was.
        rule: What it must be, as the rest of a sentence without its full stop.
    """

    def __init__(self, argument: str, value: object, rule: str) -> None:
        self.argument, self.value, self.rule = argument, value, rule
        super().__init__(f"{argument}={value} {rule}.")

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str]]:
        return type(self), (self.argument, self.value, self.rule)  # as another process raises it
