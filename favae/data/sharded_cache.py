"""Folders of numbered shards: written once, by any number of processes, and read memory-mapped.

A folder holds `plan.json` (all that determines its content), `shard-NNNNN.safetensors`, and `manifest.json`, which
repeats the plan and says how many images each shard is about ("counts"). The manifest is written last: without it, the
folder is unfinished.
Every file is either complete or absent, so a killed command goes on with the missing files when it is run again.

The manifest also has checksums (CRC-32): "checksums" of all bytes of each file, which `favae verify` compares;
"quick_checksums" of the little of each shard that is read whenever a cache is opened; "manifest_checksum" of itself.
"""

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from favae.distributed import main_process_does, process_state
from favae.errors import CacheError, DataError
from favae.files import atomic_path, lock_folder, read_json, write_text
from favae.hashing import checksum

PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
FILL_THE_GAP = "write the cache again, which fills the gap"  # the end of messages
KEEP_THE_REST = "write the cache again, which keeps the shards"
FLOATS = ("F32", "F16", "BF16")


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def open_shard(path: Path) -> safe_open:
    """Raises `CacheError` if the file is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CacheError(f"{path} is missing; {FILL_THE_GAP}") from None
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and {FILL_THE_GAP}") from error


def tensor_shapes(shard: safe_open, path: Path, dtypes: Mapping[str, Collection[str]]) -> dict[str, list[int]]:
    """The shapes of tensors that a shard must have.

    Args:
        dtypes: by the tensor's name, those that it may have, in the words of safetensors.
    Raises:
        CacheError: if a tensor is missing or of another dtype.
    """
    found = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
    wrong = [name for name, allowed in dtypes.items() if name not in found or found[name].get_dtype() not in allowed]
    if wrong:
        raise CacheError(f"{path} is no such shard, without proper {', '.join(wrong)}; delete it and {FILL_THE_GAP}")
    return {name: found[name].get_shape() for name in dtypes}


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. Much faster than `isfinite` of each."""
    if bool(values.sum().isfinite()):  # it is not, if one of the numbers is not; but it may overflow, too
        return True
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


# ----------------------------------------------------------------------------------------------------------------------
# The manifest


class Manifest(BaseModel):
    """What the manifest of any sharded cache must have."""

    counts: list[NonNegativeInt]
    checksums: dict[str, int | None]  # None: the file was missing, and perhaps is, or is written again
    quick_checksums: list[int]


ManifestSchema = TypeVar("ManifestSchema", bound=Manifest)


def read_manifest(folder: str | Path, contents: str) -> dict:
    """Raises `CacheError` if the folder is not finished, or the manifest is damaged; `contents` is for the message."""
    file = Path(folder) / MANIFEST_FILE
    if not file.is_file():
        raise CacheError(f"{folder} holds no finished {contents}")
    manifest = _read_json(file)
    if manifest.pop("manifest_checksum", None) != _checksum_of(manifest):
        raise CacheError(f"{file} is not as it was written; delete it and {KEEP_THE_REST}")
    return manifest


def check_manifest(folder: Path, manifest: dict, schema: type[ManifestSchema]) -> ManifestSchema:
    """The manifest as its schema has it. Raises `CacheError` if a key is missing or has an impossible value."""
    try:
        return schema.model_validate(manifest)
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "missing")
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise CacheError(f"{folder} is another kind of cache, or damaged: its manifest has no {key}") from error
        raise CacheError(f"{folder / MANIFEST_FILE}: {key}: {first['msg']}; delete it and {KEEP_THE_REST}") from error


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes manifest.json with the checksum of its content."""
    write_text(folder / MANIFEST_FILE, json.dumps({**manifest, "manifest_checksum": _checksum_of(manifest)}, indent=1))


def _checksum_of(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _read_json(file: Path) -> dict:
    try:
        return read_json(file)
    except DataError as error:
        raise CacheError(f"{error}; delete it and {KEEP_THE_REST}") from error


def quick_checksum(shard: safe_open) -> int:
    """CRC-32 of what tells a shard from others without reading all of it.

    This is the name, dtype and shape of each tensor, those with one dimension (labels, indices, lengths), and the first
    row of the others.
    """
    value = 0
    for name in sorted(shard.keys()):
        part = shard.get_slice(name)
        shape = part.get_shape()
        values = part[:1] if len(shape) > 1 and shape[0] else part[:]
        value = zlib.crc32(f"{name} {part.get_dtype()} {shape}".encode(), value)
        value = zlib.crc32(values.contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class CacheWriter:
    """Writes a folder of shards. Every process makes a writer and calls the same methods in the same order.

    Args:
        folder: new, empty, or begun with the same plan.
        plan: all that determines what is written, as JSON can hold it; first what makes it, such as the tokenizer.
        contents: what the folder holds, for messages.
        names: keys of the plan that only describe something, such as a path. Another value is not another plan.

    Attributes:
        begun: the plan that the folder was begun with.

    Raises:
        CacheError: if the folder was begun with another plan, or holds something else. Nothing is written then.
        FolderInUse: if another command is writing it.
    """

    def __init__(self, folder: str | Path, plan: dict, contents: str, names: Collection[str] = ()):
        self.folder, self.plan, self.contents = Path(folder), plan, contents
        self.state = process_state()
        self._files: list[Path] = []  # that belong to the cache
        self._checksums: dict[str, int] = {}  # of files that an earlier call finished, and
        self._quick_checksums: dict[str, int] = {}
        self._lock: TextIO | None = None  # of the main process, until the cache is finished
        main_process_does(self._begin)
        self._compare_plans(names)
        main_process_does(self._read_checksums)

    def _begin(self) -> None:
        """Leaves the plan in the folder, unless a plan is there already."""
        finished, begun = (self.folder / MANIFEST_FILE).exists(), (self.folder / PLAN_FILE).exists()
        others = any(not path.name.startswith(".") for path in self.folder.glob("*"))
        if others and not finished and not begun:
            raise CacheError(f"{self.folder} is not empty and not a {self.contents}; choose another folder")
        self._lock = lock_folder(self.folder)
        if not begun:
            plan = read_manifest(self.folder, self.contents) if finished else self.plan
            self._check_kind(plan)
            write_text(self.folder / PLAN_FILE, json.dumps({key: plan.get(key) for key in self.plan}, indent=1))

    def _check_kind(self, plan: dict) -> None:
        if next(iter(self.plan)) not in plan:  # what made it, which the plan of any such cache begins with
            raise CacheError(f"{self.folder} is another kind of cache, not a {self.contents}; choose another folder")

    def _read_checksums(self) -> None:
        """Sees what an earlier call finished. In its manifest, files that are missing lose their checksums: those that
        are written again may be others."""
        if not (self.folder / MANIFEST_FILE).exists():
            return
        manifest = read_manifest(self.folder, self.contents)
        known = check_manifest(self.folder, manifest, Manifest)
        checksums = {k: v if (self.folder / k).exists() else None for k, v in known.checksums.items()}
        self._checksums = {name: value for name, value in checksums.items() if value is not None}
        quick = {shard_file(self.folder, number).name: v for number, v in enumerate(known.quick_checksums)}
        self._quick_checksums = {name: value for name, value in quick.items() if name in self._checksums}
        if checksums != known.checksums:
            write_manifest(self.folder, {**manifest, "checksums": checksums})

    def _compare_plans(self, names: Collection[str]) -> None:
        self.begun = _read_json(self.folder / PLAN_FILE)
        self._check_kind(self.begun)
        changed = [key for key, value in self.plan.items() if self.begun.get(key) != value]
        if set(changed) - set(names):
            raise CacheError(
                f"{self.folder} holds a {self.contents} made with another {', '.join(changed)}; delete it or choose "
                "another folder"
            )

    def own(self, files: Sequence[Path]) -> list[int]:
        """The numbers of the files that this process writes, of those that are shared between all processes."""
        return list(range(self.state.process_index, len(files), self.state.num_processes))

    def write_missing(self, files: Sequence[Path], write: Callable[[int, Path], object], description: str) -> None:
        """Writes those of the files that do not exist; each process writes its share, by the file's number.

        Args:
            files: one for each shard, in order.
            write: called with a file's number and the temporary path where its content belongs.
            description: of the progress bar, which the main process shows.
        """
        missing = [number for number in self.own(files) if not files[number].exists()]
        hide = not missing or not self.state.is_main_process
        for number in tqdm(missing, desc=description, unit="file", disable=hide):
            with atomic_path(files[number]) as temporary:
                write(number, temporary)
        self._files += files
        self.state.wait_for_everyone()

    def finish(self, summarize: Callable[[], dict]) -> dict:
        """Writes the manifest, plan and summary together, and returns it.

        Files that an earlier call finished keep the checksums that they had then.

        Args:
            summarize: gives "counts" and whatever else belongs to the manifest; called by the main process alone.
        """
        if self.state.is_main_process:
            manifest = {**self.plan, **summarize()}
            missing = [file for file in self._files if file.name not in self._checksums]
            for file in tqdm(missing, desc="checksums", unit="file", disable=not missing):
                self._checksums[file.name] = checksum(file)
            shards = [file for file in self._files if file.suffix == ".safetensors"]
            for file in shards:
                if file.name not in self._quick_checksums:
                    with open_shard(file) as shard:
                        self._quick_checksums[file.name] = quick_checksum(shard)
            manifest["checksums"] = {file.name: self._checksums[file.name] for file in self._files}
            manifest["quick_checksums"] = [self._quick_checksums[file.name] for file in shards]
            write_manifest(self.folder, manifest)
        if self._lock is not None:
            self._lock.close()
        self.state.wait_for_everyone()
        return read_manifest(self.folder, self.contents)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def find_damage(folder: Path, contents: str) -> Iterator[str]:
    """Reads all bytes of a finished cache, and gives a few words for each file that is not as it was written.

    Raises:
        CacheError: if the folder is not finished, or its manifest is damaged.
    """
    manifest = check_manifest(folder, read_manifest(folder, contents), Manifest)
    for name, as_written in tqdm(manifest.checksums.items(), desc=str(folder), unit="file"):
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif as_written is None:
            yield f"{path} was written again, by a command that did not finish"
        elif checksum(path) != as_written:
            yield f"{path} is not as it was written"


class ShardedCache(ABC):
    """Base class of what reads a finished folder of shards. Each process opens each shard once, memory-mapped.

    Args:
        folder: of the cache.

    Attributes:
        manifest: what manifest.json holds. files: the shards.

    Raises:
        CacheError: if the folder is not finished, or a shard is missing, damaged or of another length.
    """

    contents: str  # what the folder holds, for messages
    schema: type[Manifest]  # what its manifest must have

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, self.contents)
        quick_checksums = check_manifest(self.folder, self.manifest, self.schema).quick_checksums
        self.files = [shard_file(self.folder, number) for number in range(len(self.manifest["counts"]))]
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._ends = np.cumsum(self.manifest["counts"])
        for number, (path, count) in enumerate(zip(self.files, self.manifest["counts"])):
            with open_shard(path) as shard:
                found = self.count(shard, path)
                as_written = quick_checksums[number] == quick_checksum(shard)
            if not as_written:
                raise CacheError(f"{path} is not as it was written, or of another cache; delete it and {FILL_THE_GAP}")
            if found != count:
                raise CacheError(f"{path} holds {found} images where the manifest says {count}; delete {self.folder}")

    @staticmethod
    @abstractmethod
    def count(shard: safe_open, path: Path) -> int:
        """How many images an open shard is about. Raises `CacheError` if it is not a shard of such a cache."""

    @abstractmethod
    def load(self, shard: safe_open, path: Path) -> dict[str, Tensor]:
        """What reading needs of an open shard."""

    def __len__(self) -> int:
        """Images in all shards together."""
        return sum(self.manifest["counts"])

    def locate(self, indices: np.ndarray) -> list[tuple[dict[str, Tensor], int]]:
        """The shard of each image, as `load` gave it, and the image's row there.

        Raises:
            IndexError: if there is no image with such an index.
        """
        indices = np.asarray(indices)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices must be in 0 ... {len(self) - 1}")
        numbers = self._numbers(indices)
        rows = indices - self._ends[numbers] + np.asarray(self.manifest["counts"])[numbers]
        return [(self._shard(number), row) for number, row in zip(numbers.tolist(), rows.tolist())]

    def _numbers(self, indices: np.ndarray) -> np.ndarray:
        """The number of each image's shard."""
        return np.searchsorted(self._ends, indices, side="right")

    def check_finite(self, values: Tensor, indices: np.ndarray) -> None:
        """Raises `CacheError`, which names a shard, if values (B, ...) of these images are not finite."""
        if not all_finite(values):
            row = next(row for row, value in enumerate(values) if not all_finite(value))
            path = self.files[int(self._numbers(np.asarray(indices)[row]))]
            raise CacheError(f"{path} has numbers that are not finite; delete it and {FILL_THE_GAP}")

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = self.files[number]
            with open_shard(path) as shard:
                self._shards[number] = self.load(shard, path)
        return self._shards[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # memory maps are not sent to worker processes
