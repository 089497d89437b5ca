"""Folders of numbered shards with a plan and a manifest: what the latent cache and the text states have in common."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from favae.errors import CacheError
from favae.files import write_text

MANIFEST = "manifest.json"


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def captions_file(folder: Path, number: int) -> Path:
    return folder / f"captions-{number:05}.json"


def check_plan(output: Path, plan: dict, kind: str) -> None:
    """A folder is written for one plan: the first process leaves it there, every later one must agree with it."""
    file = output / "plan.json"
    if not file.exists():
        if any(path.name != ".writing-plan.json" for path in output.iterdir()):
            raise CacheError(f"{output} is not empty and not a {kind}; choose another --output")
        write_text(file, json.dumps(plan, indent=1))
    written = json.loads(file.read_text())
    changed = [key for key, value in plan.items() if written.get(key) != value]
    if changed:
        raise CacheError(
            f"{output} holds a cache made with another {', '.join(changed)}; delete it or choose another --output"
        )


def read_manifest(folder: Path, kind: str, command: str) -> dict:
    """Raises `CacheError` for a folder that the command has not finished."""
    if not (folder / MANIFEST).is_file():
        raise CacheError(f"{folder}: no finished {kind}; write it with {command}")
    return json.loads((folder / MANIFEST).read_text())


def open_shard(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and run the same command again") from error


def read_captions(folder: Path, number: int, count: int) -> list[list[str]]:
    """The captions of each of the `count` images of a shard.

    Raises:
        CacheError: if the file is missing or damaged.
    """
    path = captions_file(folder, number)
    remedy = "write the cache again with the same command, it fills the gap"
    try:
        captions = json.loads(path.read_text())
    except FileNotFoundError:
        raise CacheError(f"{path} is missing; {remedy}") from None
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and {remedy}") from error
    if len(captions) != count:
        raise CacheError(f"{path} is of {len(captions)} images where its shard has {count}; delete it and {remedy}")
    return captions


def locate(indices: np.ndarray, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The shard of each item and its row there, for shards of so many items.

    Raises:
        IndexError: for an index that is not there.
    """
    ends = np.cumsum(counts)
    if len(indices) and not 0 <= indices.min() <= indices.max() < ends[-1]:
        raise IndexError(f"indices must be in 0 ... {ends[-1] - 1}")
    numbers = np.searchsorted(ends, indices, side="right")
    return numbers, indices - ends[numbers] + np.asarray(counts)[numbers]
