"""Settings checked by their types: those of a dataclass, or of a model's constructor. One line for a mistake."""

import inspect
import json
from collections.abc import Callable, Mapping
from copy import copy
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
)

from favae.errors import ConfigError
from favae.ranges import Decay, Depth, Number, Positive, Size, Text, Weight, describe

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=())

# Arguments of models that have no range of their own.
RANGES_BY_NAME: dict[str, Any] = {
    "layers_per_block": Depth,
    "num_layers": Depth,
    "head_layers": Depth,
    "num_quantizers": Depth,
    "mlp_ratio": Annotated[float, Field(ge=0.25, le=64)],
    "scaling_factor": Positive,
    "latents_std": tuple[Positive, ...] | None,
    "dropout": Decay,
    "norm_eps": Positive,
    "wavelet": Text,
    "norm_type": Text,
    "down_block_types": tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...],
    "up_block_types": tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...],
    "act_fn": Literal["swish", "silu", "mish", "gelu", "relu"],
    "upsample_fn": Literal["nearest", "nearest-exact", "bilinear", "bicubic"],
    "activation_fn": Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"],
}

RANGES_OF_UNETS = {
    **RANGES_BY_NAME,
    "down_block_types": tuple[Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"], ...],
    "up_block_types": tuple[Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"], ...],
    "time_embedding_type": Literal["positional"],  # the other takes the logarithm of times, which begin with 0
    "class_embed_type": None,  # the others take numbers, and no classes
    "mid_block_type": Literal["UNetMidBlock2D"] | None,
    "mid_block_scale_factor": Positive,
    "downsample_type": Literal["conv", "resnet"],
    "upsample_type": Literal["conv", "resnet"],
    "resnet_time_scale_shift": Literal["default", "scale_shift"],
}

RANGES_BY_TYPE: tuple[tuple[Any, Any], ...] = (
    (int, Size),
    (PositiveInt, Size),
    (float, Number),
    (PositiveFloat, Positive),
    (NonNegativeFloat, Weight),
)

Settings = TypeVar("Settings")


def validate(
    schema: type[Settings], settings: dict[str, Any], prefix: str = "", texts: Mapping[tuple, str] | None = None
) -> Settings:
    """Builds a dataclass or pydantic model from plain data: dicts, lists, numbers, strings, booleans and None.

    Args:
        prefix: where the settings stand, such as "model", for the message.
        texts: what was typed for some of the values, by their places. It counts where the schema wants a text and
            YAML made something else of it: a folder named 007, train.mixed_precision=no.
    Raises:
        ConfigError: for the first mistake: an unknown key, a wrong type or a value out of range.
    """
    try:
        # As JSON, because a list may then stand for a tuple and an integer for a float, and nothing else is converted.
        return TypeAdapter(schema).validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        text = (texts or {}).get(first["loc"])
        if first["type"] in ("string_type", "literal_error") and text is not None and first["input"] != text:
            return validate(schema, _replaced(settings, first["loc"], text), prefix, texts)
        raise ConfigError(_message(schema, first, prefix)) from error


def _replaced(settings: Any, path: tuple[str | int, ...], value: str) -> Any:
    """A copy of nested settings with another value in one place."""
    if not path:
        return value
    copied = copy(settings)
    copied[path[0]] = _replaced(settings[path[0]], path[1:], value)
    return copied


def _message(schema: type, error: Any, prefix: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(filter(None, [prefix, *path]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section = ".".join(filter(None, [prefix, *path[:-1]])) or "the top level"
        return f"unknown key {key}; {section} takes {', '.join(_keys(schema, path[:-1]))}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    return f"{key}{describe(error)}"


def _keys(schema: Any, path: list[str]) -> list[str]:
    """The keys of the section that `path` leads to."""
    for name in path:
        if name.isdigit():  # an entry of a list, whose type the step before has found
            continue
        hint = get_type_hints(schema).get(name, Any)
        schema = next((choice for choice in (hint, *get_args(hint)) if isinstance(choice, type)), Any)
    return list(getattr(schema, "model_fields", None) or getattr(schema, "__dataclass_fields__", {}))


@cache
def signature_schema(function: Callable, skip: tuple[str, ...] = ()) -> type[BaseModel]:
    """A pydantic model with a field for each parameter of a constructor or function, of the annotated type.

    diffusers annotates tuples of any length as tuples of one element (`tuple[int]`), which is allowed for, and gives no
    ranges. Integers there are sizes and numbers of things: without a range of their own they are at least 1, and so are
    the lengths of tuples. Other arguments without a range have that of their name, see `RANGES_BY_NAME`.
    """
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", *skip) or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        declared = hints.get(name, Any)
        ranges = RANGES_OF_UNETS if "mid_block_type" in hints else RANGES_BY_NAME
        annotation = declared if declared is bool else _with_ranges(ranges.get(name, declared))
        fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model(function.__qualname__, __config__=STRICT, **fields)


def _with_ranges(annotation: Any, shortest: int = 1) -> Any:
    choices = get_args(annotation)
    for plain, ranged in RANGES_BY_TYPE:
        if annotation == plain:
            return ranged
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(_with_ranges(choice) for choice in choices)]  # noqa: UP007
    if get_origin(annotation) is tuple and (len(choices) == 1 or choices[1] is ...):
        entry = _with_ranges(choices[0], shortest=0)  # tuples inside may be empty
        return Annotated[tuple[entry, ...], Field(min_length=shortest)]  # type: ignore[valid-type]
    return annotation
