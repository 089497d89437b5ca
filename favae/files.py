"""Files and folders that are either complete or absent: after a kill, on a full disk, and after a power cut."""

import errno
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TextIO

import psutil
from safetensors import SafetensorError
from tqdm import tqdm

from favae.errors import SHARED_MEMORY, ConfigError, DataError, DiskFull, FavaeError, FolderInUse

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

# What torch, safetensors and their users raise for a file that is damaged or holds something else.
READ_ERRORS = (
    pickle.UnpicklingError,
    SafetensorError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
UNFINISHED = ".writing-"  # the names of what is being written begin so; a process and its host follow
REPLACED = f"{UNFINISHED}old-"  # those of folders whose place another one takes; process, host, "," and the name follow
LONGEST_NAME = 255  # bytes, of a file
LOCK_FILE = ".lock"
SETTINGS_FILE = "settings.json"  # in a folder of samples, how they were made
# Some libraries lose the number of the error. PyTorch loses its text, too; then only the disk itself can tell.
DISK_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")
NOTHING_FREE = 1 << 16  # bytes


@contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `final` and renames it to `final` when the block ends without an error.

    The block may write a file or create a folder there. What stood at `final` before is replaced, and the temporary
    path is removed if the block raises. All of it is on the disk before it gets its name. Parent folders are created.

    Raises:
        DiskFull: if the block fails for want of space.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(final.parent.resolve())
    temporary = temporary_path(final)
    with removed_on_error(temporary, final):
        yield temporary
        sync(temporary)
        replace(temporary, final)


def check_output(path: str | Path, kind: Literal["folder", "file"], name: str) -> None:
    """Looks whether a file or folder can be written, before anything that takes time.

    Args:
        path: need not exist, nor do its parents.
        name: of the option or setting that it was given by.
    Raises:
        ConfigError: if something of the other kind is there, or its place cannot be written to.
    """
    path = Path(path)
    try:
        found = next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be written ({error.strerror})") from error
    if found == path and kind == "file" and path.is_dir():
        raise ConfigError(f"{name}: {path} is a folder; it takes the name of a file")
    place = found.absolute().parent if found == path and kind == "file" else found
    if not place.is_dir():
        raise ConfigError(f"{name}: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {place} cannot be written to")


def temporary_path(final: Path) -> Path:
    """The name under which this process writes `final`."""
    beginning, name = f"{UNFINISHED}{os.getpid()}-{socket.gethostname()}-", final.name
    if len(os.fsencode(beginning + name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + final.suffix
    return final.with_name(beginning + name)


@contextmanager
def removed_on_error(temporary: Path, final: Path) -> Iterator[None]:
    """Removes what the block has written at a temporary path if the block raises.

    Raises:
        DiskFull: if the block fails for want of space. The message names `final`.
    """
    try:
        yield
    except BaseException as error:
        full = _is_disk_full(error, temporary.parent)
        remove(temporary)
        if not full:
            raise
        free = tqdm.format_sizeof(shutil.disk_usage(temporary.parent).free, "B")
        raise DiskFull(f"the disk is full: {final} needs more than the {free} that are free") from error


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    if isinstance(error, FavaeError) or SHARED_MEMORY in str(error):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if any(message in str(error) for message in DISK_FULL_MESSAGES):
        return True
    return isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(folder).free < NOTHING_FREE


def append_text(file: Path, text: str) -> None:
    """Adds to the end of a UTF-8 text file. Raises `DiskFull` if it cannot."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        if not _is_disk_full(error, file.parent):
            raise
        raise DiskFull(f"the disk is full: {file} cannot be continued") from error


def write_text(final: str | Path, text: str) -> None:
    """Writes a UTF-8 text file by way of `atomic_path`."""
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        DataError: if it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{file} is damaged")
    return content


def read_json_lines(file: Path) -> list[dict]:
    """The records of a log, one JSON object with a "step" per line. A last line that a killed process has torn is left
    out.

    Raises:
        DataError: if another line is damaged.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise DataError(f"{file}: line {number} is damaged; delete it, or the file")
    return records


def sync(path: Path) -> None:
    """Returns when a file, or a folder with all that is in it, is on the disk and survives a power cut."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync_one(each)


def _sync_one(path: Path) -> None:
    if os.name != "posix":  # elsewhere, folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(temporary: Path, final: Path) -> None:
    """Renames a complete file or folder; what stood at `final` is removed only after that."""
    old = final.with_name(f"{REPLACED}{os.getpid()}-{socket.gethostname()},{final.name}")
    is_there = final.is_dir()
    if is_there and not temporary.is_dir():
        raise IsADirectoryError(errno.EISDIR, "there is a folder of this name", str(final))
    if is_there:  # a folder cannot be renamed onto another one
        final.replace(old)
    try:
        temporary.replace(final)
    except BaseException:
        if is_there:
            old.replace(final)
        raise
    _sync_one(final.parent)  # the name as well
    if is_there:
        remove(old)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftover(path: Path) -> None:
    """Removes what a killed process was writing. A folder that it was about to replace gets its name back."""
    if path.name.startswith(REPLACED):
        final = path.with_name(path.name.partition(",")[2])
        if not final.exists():
            path.replace(final)
            return
    remove(path)


def lock_folder(folder: Path) -> TextIO:
    """Makes this process the only one that writes into a folder, which is created, until the result is closed.

    The lock ends with the process, however it ends. What killed processes were writing there is removed. A file system
    without locks gets none.

    Returns:
        The open file of the lock, which names the process and its host.
    Raises:
        FolderInUse: if another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("a+")
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise FolderInUse(f"{folder} is being written by {file.read().strip() or 'another process'}") from None
        except OSError:
            pass
    with suppress(OSError):  # on a full disk, what is written next says so
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    for path in folder.glob(f"{UNFINISHED}*"):
        remove_leftover(path)
    return file


def is_unwritten(folder: Path) -> bool:
    """Whether a folder holds nothing but the lock and the unfinished files of a killed process."""
    return all(path.name == LOCK_FILE or path.name.startswith(UNFINISHED) for path in folder.iterdir())


@functools.cache
def _remove_leftovers_once(folder: Path) -> None:
    """Removes what processes of this host were writing here when they were killed; once, since folders may be large."""
    own_host = re.compile(rf"{re.escape(UNFINISHED)}(?:old-)?(\d+)-{re.escape(socket.gethostname())}[-,]")
    for path in folder.glob(f"{UNFINISHED}*"):
        match = own_host.match(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            with suppress(OSError):  # another process may be at it, or it is another user's
                remove_leftover(path)
