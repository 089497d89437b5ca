"""Ranges of numbers as types, for settings, models and options alike. No number is NaN or infinite."""

from typing import Annotated

from pydantic import Field

LARGEST_INTEGER = 2**31 - 1  # what numpy's seeds and the sizes of tensors allow

Count = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
Step = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Size = Annotated[int, Field(ge=1, le=2**24)]  # of a layer
Depth = Annotated[int, Field(ge=1, le=1024)]  # of a network, in layers
Halvings = Annotated[int, Field(ge=1, le=16)]  # how often the side of an image is halved
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # of a moving average
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
