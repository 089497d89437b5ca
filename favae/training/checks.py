"""What is wrong with a setting, in one line."""

from typing import Any

from favae.errors import ConfigError


def one_of(key: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value}")


def at_least(key: str, value: float, minimum: float) -> None:
    if value < minimum:
        raise ConfigError(f"{key} must be at least {minimum}, got {value}")
