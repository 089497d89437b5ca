"""The errors that a user can fix. Commands print their message, which is one line, and exit with 1."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from favae.signals import Terminated, end_with_launcher, sigterm_raises


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


class DiskFull(FavaeError):
    """A file or folder was not written for want of space. What was there before is as it was."""


class FolderInUse(FavaeError):
    """Another process is writing into this folder."""


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


def one_line(error: Exception) -> str:
    """The line of an error's message that a command prints."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A worker of a DataLoader puts its own traceback before the message.
    return lines[-1] if lines[0].startswith("Caught ") else lines[0]


@contextmanager
def exit_on_error(
    after_interrupt: str, errors: tuple[type[Exception], ...] = (FavaeError, OSError, ValueError)
) -> Iterator[None]:
    """Ends the process as every command does when something goes wrong inside the block.

    An error the user can fix is one line, "error: ...", and exit code 1; so is a full disk, whatever was being written.
    Ctrl-C is exit code 130, and SIGTERM 143, in one line as well.

    Args:
        after_interrupt: what running the same command again does, which is printed after Ctrl-C and SIGTERM.
        errors: what the user can fix; others keep their traceback.
    """
    try:
        end_with_launcher()
        with sigterm_raises():
            yield
    except errors as error:
        sys.exit(f"error: {one_line(error)}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", 0)) == 0:  # of the processes that torchrun started, one is enough
            print(f"interrupted{error}: {after_interrupt}", file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
