"""Rules on arguments, stated in annotations and enforced where a function is called."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from pydantic import Field, Strict, TypeAdapter, ValidationError

from ldm.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


Whole = Annotated[int, Strict()]
"""A whole number: neither 5.0, true nor "5"."""
Number = Annotated[float, Strict()]
Count = Annotated[Whole, Field(ge=1, le=10**9)]
"""How many, from 1 on."""
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Size = Annotated[Whole, Field(ge=1, le=65_536)]
"""Of a layer: no machine holds a larger one."""
Depth = Annotated[Whole, Field(ge=1, le=1000)]
"""How many layers."""
Steps = Annotated[Whole, Field(ge=1, le=100_000)]
"""Of a chain, or of a sampler."""
Share = Annotated[Number, Field(ge=0, le=1)]
"""A part of a whole, from 0 to 1."""
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Switch = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1)]
_SAID = {
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
"""By kind of error, where pydantic would say it in other words."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Enforce the annotations of a function, or of an `__init__`, that carry rules: `steps: Count`.

    Other annotations are documentation. The function receives what a rule makes of its argument: a float where a
    `Number` was given as 3.

    Raises:
        InputError: naming the first argument that breaks its rule.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(apply_rules(function, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    return call


def apply_rules(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that have rules, as their rules make them.

    Args:
        function: Or a class, whose annotations are those of its `__init__`, or of its fields.

    Raises:
        InputError: naming the first argument that breaks its rule.
    """
    followed = {}
    for name, rule in _rules(function).items():
        if name not in arguments:
            continue
        try:
            followed[name] = rule.validate_python(arguments[name])
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            said = _SAID.get(wrong["type"], wrong["msg"].removeprefix("Value error, ").replace("Input should", "must"))
            raise InputError(name, arguments[name], said.format(**wrong.get("ctx", {}))) from None
    return followed


@functools.cache
def _rules(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """By argument, where its annotation has a rule in it."""
    is_plain_class = isinstance(function, type) and "__init__" in vars(function)
    hints = get_type_hints(function.__init__ if is_plain_class else function, include_extras=True)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name != "return" and "Annotated[" in repr(hint)}
