"""The errors that a user can fix. Commands print their message, which is one line, and exit with 1."""

from collections.abc import Iterator
from contextlib import contextmanager


class FavaeError(RuntimeError):
    """Base class of errors the user can fix. The message is one line that names what is wrong and what would help."""


class ConfigError(FavaeError):
    """A setting is unknown, has the wrong type or is impossible. The message names its key as the user wrote it."""


class DataError(FavaeError):
    """Images, samples or results are missing, damaged, or not what was asked for."""


class CacheError(FavaeError):
    """A cache of latents or text embeddings cannot be used or continued."""


class ModelError(FavaeError):
    """A model cannot be opened, or cannot take the images it was given."""


class MissingWeights(FavaeError):
    """Pretrained weights are neither cached nor downloadable."""


class CheckpointError(FavaeError):
    """A checkpoint or a weight file cannot be written, read, converted or resumed."""


class NonFiniteError(FavaeError):
    """A loss or a sample is NaN or infinite."""


@contextmanager
def hint(text: str) -> Iterator[None]:
    """Adds what the user can do about it to the message of a `FavaeError` that is raised inside the block.

    Constructors do not know which command or setting they were called by; the caller does, and says so here.
    """
    try:
        yield
    except FavaeError as error:
        raise type(error)(f"{error}; {text}") from error
