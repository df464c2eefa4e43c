"""Rules on arguments, stated in annotations and enforced where a function is called."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from ldm.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def _refuse_look_alikes(value: Any) -> Any:
    """Neither true nor "5" is a number here, as pydantic would have it."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


Whole = Annotated[int, BeforeValidator(_refuse_look_alikes)]
"""A whole number; 1e5 counts as one."""
Number = Annotated[float, BeforeValidator(_refuse_look_alikes)]
Count = Annotated[Whole, Field(ge=1, le=10**9)]
"""How many, from 1 on."""
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
"""A part of a whole, from 0 to 1."""
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
_SAID = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
}
"""By kind of error, where pydantic would say it in other words."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Enforce the annotations of a function, or of an `__init__`, that carry rules: `steps: Count`.

    Other annotations are documentation. A whole number that was given as 1e5 arrives as an int.

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
    """Those of some arguments that have rules, as the function is to receive them.

    Args:
        function: Or a class, whose annotations are those of its `__init__`, or of its fields.

    Raises:
        InputError: naming the first argument that breaks its rule.
    """
    rules = _rules(function)
    return {name: _check(name, value, rules[name]) for name, value in arguments.items() if name in rules}


def _check(name: str, value: Any, rule: TypeAdapter[Any]) -> Any:
    try:
        return rule.validate_python(value)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        said = _SAID.get(wrong["type"], wrong["msg"].removeprefix("Value error, ").replace("Input should", "must"))
        raise InputError(name, value, said.format(**wrong.get("ctx", {}))) from None


@functools.cache
def _rules(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """By argument, where its annotation has a rule in it."""
    is_plain_class = isinstance(function, type) and "__init__" in vars(function)
    hints = get_type_hints(function.__init__ if is_plain_class else function, include_extras=True)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name != "return" and "Annotated[" in repr(hint)}
