"""Files and folders that are complete or absent, whenever the process is killed."""

import shutil
from collections.abc import Callable
from pathlib import Path


def write_file(final: Path, text: str) -> None:
    """Writes under a temporary name and renames."""
    temporary = final.with_name(f".writing-{final.name}")
    temporary.write_text(text)
    temporary.rename(final)


def write_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary_folder)` and renames the folder, replacing an older one of that name."""
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
