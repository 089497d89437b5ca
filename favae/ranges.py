"""Ranges of numbers as types, for settings, models and options alike. No number is NaN or too large."""

import argparse
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

LARGEST_NUMBER = 1e30  # float32 can hold it
LARGEST_INTEGER = 2**31 - 1  # what numpy's seeds and the sizes of tensors allow

Count = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
Step = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Pixels = Annotated[int, Field(ge=1, le=2**16)]  # along a side of an image
Size = Annotated[int, Field(ge=1, le=2**24)]  # of a layer
Depth = Annotated[int, Field(ge=1, le=1024)]  # of a network, in layers
Workers = Annotated[int, Field(ge=0, le=1024)]  # processes that read
Halvings = Annotated[int, Field(ge=1, le=16)]  # how often the side of an image is halved
Number = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=LARGEST_NUMBER, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=LARGEST_NUMBER, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]  # of learning
Shift = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)]  # of the times of a flow
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # of a moving average
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


def describe(error: Any) -> str:
    """What pydantic found wrong with a value, as the end of a sentence that begins with the name of the value.

    Args:
        error: one of `ValidationError.errors()`.
    """
    expected = re.sub(r"^(Value error, |\w+ should (?=be|have))", "", error["msg"]).rstrip(".")
    expected = expected.replace("valid array", "list").replace("an object", "a mapping")
    separator = " must " if expected.startswith(("be ", "have ")) else ": "
    return f"{separator}{expected}, got {error['input']!r}"


def in_range(annotation: Any) -> Callable[[str], Any]:
    """What argparse takes as the type of an option whose values are of one of these types."""
    adapter = TypeAdapter(annotation)

    def convert(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(describe(error.errors()[0]).strip(": ")) from None

    return convert
