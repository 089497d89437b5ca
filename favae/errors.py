"""The errors that a user can fix. Commands print their message, which is one line, and exit with 1."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from favae.signals import Terminated, end_with_launcher, sigterm_raises

SHARED_MEMORY = "shared memory"  # in what PyTorch says when it is full, in the words of a full disk
FAULTS_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)


class FavaeError(RuntimeError):
    """Base class of errors the user can fix. The message is one line that names what is wrong and what would help."""

    def __init__(self, message: str = ""):
        super().__init__(_without_traceback(str(message)))


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


class CompressedFileError(FavaeError):
    """A file of a compressed image is damaged, foreign, or of another model."""


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
    lines = [line for line in _without_traceback(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _without_traceback(message: str) -> str:
    """The message alone, before which a worker of a DataLoader puts its own traceback and the class of the error."""
    if not message.startswith("Caught "):
        return message
    return re.sub(r"^[\w.]+: ", "", message.rstrip().splitlines()[-1])


def end_with(error: Exception) -> NoReturn:
    """Ends the process with the line of an error and exit code 1; without the line if another process has printed one.

    Processes that a launcher has started mostly meet the same error, or fail because one of them has ended.
    """
    sys.exit(f"error: {one_line(error)}" if _claim_error() else 1)


def _claim_error() -> bool:
    """Whether this process is the first to fail of those that one launcher has started on this machine."""
    file = _file_of_first_error()
    try:
        if file is not None:
            file.open("x").close()
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _another_has_failed() -> bool:
    """Whether a process of the same launcher has ended with an error, and has said why."""
    file = _file_of_first_error()
    return file is not None and file.exists()


def _file_of_first_error() -> Path | None:
    """A file in the folder that torchrun and accelerate make for each start of these processes."""
    own_folder = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own_folder).parent.parent / "favae-error" if own_folder else None


@contextmanager
def exit_on_error(
    after_interrupt: str, errors: tuple[type[Exception], ...] = (FavaeError, OSError, ValueError)
) -> Iterator[None]:
    """Ends the process as every command does when something goes wrong inside the block.

    An error the user can fix is one line, "error: ...", and exit code 1; so is a disk that is full or cannot be
    written, whatever was being written, and a worker of a DataLoader that was killed.
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
        end_with(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FAULTS_OF_A_DISK:
            end_with(error)
        if isinstance(error, RuntimeError) and (
            str(error).startswith("DataLoader worker") or SHARED_MEMORY in str(error)
        ):  # mostly for want of memory
            end_with(DataError(f"{one_line(error).rstrip('. ')}; fewer workers (num_workers) need less memory"))
        if _another_has_failed():
            sys.exit(1)  # mostly the connection to that process was lost
        raise
    except KeyboardInterrupt as error:
        # Of the processes that torchrun started, one is enough, and none when it ends all for an error.
        if int(os.environ.get("RANK", 0)) == 0 and not _another_has_failed():
            print(f"interrupted{error}: {after_interrupt}", file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
