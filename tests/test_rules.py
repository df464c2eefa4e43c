"""Validation rules in annotations: rejected values and error messages."""

import pytest

from ldm.errors import InputError
from ldm.rules import Count, Fraction, Number, checked


class Example:
    @checked
    def __init__(
        self, steps: Count, *, sizes: list[Count] | None = None, drop: Fraction = 0.5, shift: Number = 0
    ) -> None:
        self.steps, self.sizes = steps, sizes


def test_valid_arguments_are_accepted():
    assert Example(2, sizes=[1, 2]).sizes == [1, 2]
    assert Example(1).sizes is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0 must be 1 or more."),
        ({"steps": 5.0}, "steps=5.0 must be a whole number."),
        ({"steps": "5"}, "steps=5 must be a whole number."),
        ({"steps": True}, "steps=True must be a whole number."),
        ({"steps": None}, "steps=None must be a whole number."),
        ({"steps": 1, "sizes": [4, 0]}, "sizes=[4, 0] must be 1 or more."),
        ({"steps": 1, "sizes": 4}, "sizes=4 must be a list."),
        ({"steps": 1, "drop": float("nan")}, "drop=nan must be 1 or less."),
        ({"steps": 1, "drop": 1.5}, "drop=1.5 must be 1 or less."),
    ],
)
def test_error_states_argument_value_and_rule(arguments, message):
    with pytest.raises(InputError) as error:
        Example(**arguments)
    assert str(error.value) == message
