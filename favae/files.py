"""Files and folders that are either complete or absent, even if the process is killed while it writes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `final` and renames it to `final` when the block ends without an error.

    The block may write a file or create a folder there. What stood at `final` before is replaced, and the temporary
    path is removed if the block raises. Parent folders are created.
    """
    final = Path(final)
    temporary = final.with_name(f".writing-{final.name}")
    _remove(temporary)  # left behind by a killed process
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    except BaseException:
        _remove(temporary)
        raise
    if final.is_dir():  # a folder cannot be renamed onto another one
        shutil.rmtree(final)
    temporary.replace(final)


def write_text(final: str | Path, text: str) -> None:
    """Writes a UTF-8 text file by way of `atomic_path`."""
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
