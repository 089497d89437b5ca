"""Settings checked by their types: those of a dataclass, or of a model's constructor. One line for a mistake."""

import inspect
import json
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from favae.errors import ConfigError

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

# Numbers with a range, for the dataclasses of settings. What is an error says so with the key in front.
Count = Annotated[int, Field(ge=1)]
Step = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]

Settings = TypeVar("Settings")


def validate(schema: type[Settings], settings: dict[str, Any], prefix: str = "") -> Settings:
    """Builds a dataclass or pydantic model from plain data: dicts, lists, numbers, strings, booleans and None.

    Args:
        prefix: where the settings stand, such as "model", for the message.
    Raises:
        ConfigError: for the first mistake: an unknown key, a wrong type or a value out of range.
    """
    try:
        # As JSON, because a list may then stand for a tuple and an integer for a float, and nothing else is converted.
        return TypeAdapter(schema).validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_message(schema, error.errors()[0], prefix)) from error


def _message(schema: type, error: Any, prefix: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(filter(None, [prefix, *path]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section = ".".join(filter(None, [prefix, *path[:-1]])) or "the top level"
        return f"unknown key {key}; {section} takes {', '.join(_keys(schema, path[:-1]))}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    expected = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be").rstrip(".")
    return (
        f"{key}: {expected}, got {error['input']!r}"
        if "must be" not in expected
        else (f"{key} {expected}, got {error['input']!r}")
    )


def _keys(schema: Any, path: list[str]) -> list[str]:
    """The keys of the section that `path` leads to."""
    for name in path:
        hint = get_type_hints(schema).get(name, Any) if not name.isdigit() else (get_args(schema) or (Any,))[0]
        schema = next((choice for choice in (hint, *get_args(hint)) if isinstance(choice, type)), Any)
    return list(getattr(schema, "model_fields", None) or getattr(schema, "__dataclass_fields__", {}))


@cache
def signature_schema(function: Callable, skip: tuple[str, ...] = ()) -> type[BaseModel]:
    """A pydantic model with a field for each parameter of a constructor or function, of the annotated type.

    diffusers annotates tuples of any length as tuples of one element (`tuple[int]`), which is allowed for.
    """
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", *skip) or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = _any_length(hints.get(name, Any))
        fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model(function.__qualname__, __config__=STRICT, **fields)


def _any_length(annotation: Any) -> Any:
    if get_origin(annotation) is tuple and len(get_args(annotation)) == 1:
        return tuple[get_args(annotation)[0], ...]  # type: ignore[misc]
    if type(None) in get_args(annotation):
        return Union[tuple(_any_length(choice) for choice in get_args(annotation))]  # noqa: UP007
    return annotation
