"""Validation rules for arguments, declared as annotations and enforced when a function is called."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from pydantic import Field, Strict, TypeAdapter, ValidationError

from ldm.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


Integer = Annotated[int, Strict()]
"""An integer; 5.0, True and "5" are not accepted."""
Number = Annotated[float, Strict()]
Count = Annotated[Integer, Field(ge=1, le=10**9)]
"""A positive integer."""
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Size = Annotated[Integer, Field(ge=1, le=65_536)]
"""Width of a layer. A layer of the maximum width would not fit in any machine's memory."""
Depth = Annotated[Integer, Field(ge=1, le=1000)]
"""Number of layers."""
Steps = Annotated[Integer, Field(ge=1, le=100_000)]
"""Number of steps of a chain or a sampler."""
Fraction = Annotated[Number, Field(ge=0, le=1)]
"""A fraction of a total, from 0 to 1."""
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1)]
_RULES_BY_ERROR = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt:.12g}",
    "greater_than_equal": "must be {ge:.12g} or more",
    "less_than": "must be below {lt:.12g}",
    "less_than_equal": "must be {le:.12g} or less",
}
"""Rules by pydantic error type. Errors of any other type keep pydantic's message."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Enforce the rules in the annotations of a function or an `__init__`, such as `steps: Count`.

    Annotations without rules are not enforced. The function receives the validated values: a `Number` passed as 3
    becomes 3.0.

    Raises:
        InputError: for the first argument that breaks its rule.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(apply_rules(function, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    return call


def apply_rules(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the arguments that have rules, and return their validated values.

    Args:
        function: A function or a class. For a class, the annotations of its `__init__` apply, or those of its fields if
            it has no `__init__` of its own.

    Raises:
        InputError: for the first argument that breaks its rule.
    """
    validated = {}
    for name, rule in _rules(function).items():
        if name not in arguments:
            continue
        try:
            validated[name] = rule.validate_python(arguments[name])
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            default = details["msg"].removeprefix("Value error, ").replace("Input should", "must")
            message = _RULES_BY_ERROR.get(details["type"], default)
            raise InputError(name, arguments[name], message.format(**details.get("ctx", {}))) from None
    return validated


@functools.cache
def _rules(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Return a validator for each argument whose annotation contains a rule."""
    is_plain_class = isinstance(function, type) and "__init__" in vars(function)
    hints = get_type_hints(function.__init__ if is_plain_class else function, include_extras=True)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name != "return" and "Annotated[" in repr(hint)}
