"""Reading recipes and `key=value` overrides: what their values are to YAML, and the texts that stand for them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from favae.errors import ConfigError

# Where a value stands, such as ("stages", 0, "start_step"), and its text as it was typed.
Texts: TypeAlias = dict[tuple[str | int, ...], str]

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError)


def read_settings(file: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Texts]:
    """The settings of a YAML file with `key=value` overrides, and the texts that they were typed as.

    YAML takes 007 for the number 7 and no for false. Where the schema wants a text, it finds there what was typed.

    Raises:
        ConfigError: for a file or an override that cannot be read.
    """
    try:
        settings = OmegaConf.load(file)
        texts = dict(_texts(yaml.compose(Path(file).read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except UNREADABLE as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, DictConfig):
        raise ConfigError(f"{file}: expected a mapping of settings")
    for override in overrides:
        changes, override_texts = _read_override(override)
        settings = OmegaConf.create(merge(settings, changes, override))
        texts |= override_texts
    return merge(settings, {}, str(file)), texts


def merge(settings: Any, changes: Any, name: str) -> dict[str, Any]:
    """Settings with some of them changed, as plain data.

    Args:
        name: of the changes, for the message.
    Raises:
        ConfigError: if the changes do not fit, such as a list in the place of a section.
    """
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(settings, changes), resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _read_override(override: str) -> tuple[dict[str, Any], Texts]:
    """The nested dict of `section.key=value`, and its texts."""
    key, separator, text = override.partition("=")
    path = tuple(key.split("."))
    if not separator or not all(path):
        raise ConfigError(f"'{override}' is not of the form key=value")
    if not text:
        raise ConfigError(f"{override} has no value; null stands for none")
    try:
        node = yaml.compose(text)
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"]  # type: ignore
        is_plain = node is None or isinstance(node, yaml.ScalarNode) and node.style is None
    except UNREADABLE:  # a text with brackets, braces and the like
        node, value, is_plain = None, text, True
    if is_plain and (isinstance(value, str) or value is None and text.lower() != "null"):
        value = text  # with what would be a comment, and ~ as it is
    texts = {(*path, *inner): typed for inner, typed in _texts(node)}
    changes = {path[-1]: value}
    for part in reversed(path[:-1]):
        changes = {part: changes}
    return changes, texts | {path: text}


def _texts(node: yaml.Node | None, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(node, yaml.ScalarNode):
        yield path, node.value
    elif isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield from _texts(entry, (*path, index))
    elif isinstance(node, yaml.MappingNode):
        for key, entry in node.value:
            yield from _texts(entry, (*path, key.value if isinstance(key, yaml.ScalarNode) else str(key)))
