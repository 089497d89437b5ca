"""Folders of numbered shards: written once, by any number of processes, and read memory-mapped.

A folder holds `plan.json` (all that determines its content), `shard-NNNNN.safetensors`, and `manifest.json`, which
repeats the plan and says how many images each shard is about ("counts"). The manifest is written last: without it, the
folder is unfinished.
Every file is either complete or absent, so a killed command goes on with the missing files when it is run again.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from favae.distributed import process_state
from favae.errors import CacheError
from favae.files import atomic_path, write_text

PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
FILL_THE_GAP = "write the cache again, which fills the gap"  # the end of messages


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


def read_manifest(folder: str | Path, contents: str) -> dict:
    """Raises `CacheError` if the folder is not finished; `contents` says what it should hold, for the message."""
    file = Path(folder) / MANIFEST_FILE
    if not file.is_file():
        raise CacheError(f"{folder} holds no finished {contents}")
    return json.loads(file.read_text())


class CacheWriter:
    """Writes a folder of shards. Every process makes a writer and calls the same methods in the same order.

    Args:
        folder: new, empty, or begun with the same plan.
        plan: all that determines what is written, as JSON can hold it.
        contents: what the folder holds, for messages.

    Raises:
        CacheError: if the folder was begun with another plan, or holds something else. Nothing is written then.
    """

    def __init__(self, folder: str | Path, plan: dict, contents: str):
        self.folder, self.plan, self.contents = Path(folder), plan, contents
        self.state = process_state()
        if self.state.is_main_process:
            self._begin()
        self.state.wait_for_everyone()
        self._compare_plans()

    def _begin(self) -> None:
        """Leaves the plan in the folder, unless a plan is there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN_FILE).exists():
            if any(not path.name.startswith(".writing-") for path in self.folder.iterdir()):
                raise CacheError(f"{self.folder} is not empty and not a {self.contents}; choose another folder")
            write_text(self.folder / PLAN_FILE, json.dumps(self.plan, indent=1))

    def _compare_plans(self) -> None:
        begun = json.loads((self.folder / PLAN_FILE).read_text())
        changed = [key for key, value in self.plan.items() if begun.get(key) != value]
        if changed:
            raise CacheError(
                f"{self.folder} holds a {self.contents} made with another {', '.join(changed)}; delete it or choose "
                "another folder"
            )

    def write_missing(self, files: Sequence[Path], write: Callable[[int, Path], None], description: str) -> None:
        """Writes those of the files that do not exist; each process writes its share, by the file's number.

        Args:
            files: one for each shard, in order.
            write: called with a file's number and the temporary path where its content belongs.
            description: of the progress bar, which the main process shows.
        """
        processes, own = self.state.num_processes, self.state.process_index
        missing = [number for number, file in enumerate(files) if number % processes == own and not file.exists()]
        hide = not missing or not self.state.is_main_process
        for number in tqdm(missing, desc=description, unit="shard", disable=hide):
            with atomic_path(files[number]) as temporary:
                write(number, temporary)
        self.state.wait_for_everyone()

    def finish(self, summarize: Callable[[], dict]) -> dict:
        """Writes the manifest, plan and summary together, and returns it.

        Args:
            summarize: gives "counts" and whatever else belongs to the manifest; called by the main process alone.
        """
        if self.state.is_main_process:
            write_text(self.folder / MANIFEST_FILE, json.dumps({**self.plan, **summarize()}, indent=1))
        self.state.wait_for_everyone()
        return read_manifest(self.folder, self.contents)


class ShardedCache(ABC):
    """Base class of what reads a finished folder of shards. Each process opens each shard once, memory-mapped.

    Args:
        folder: of the cache.

    Attributes:
        manifest: what manifest.json holds.

    Raises:
        CacheError: if the folder is not finished, or a shard is missing, damaged or of another length.
    """

    contents: str  # what the folder holds, for messages

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, self.contents)
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._ends = np.cumsum(self.manifest["counts"])
        for number, count in enumerate(self.manifest["counts"]):
            path = shard_file(self.folder, number)
            with open_shard(path) as shard:
                found = self.count(shard, path)
            if found != count:
                raise CacheError(f"{path} holds {found} images where the manifest says {count}; delete {self.folder}")

    @staticmethod
    @abstractmethod
    def count(shard: safe_open, path: Path) -> int:
        """How many images an open shard is about."""

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
        numbers = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._ends[numbers] + np.asarray(self.manifest["counts"])[numbers]
        return [(self._shard(number), row) for number, row in zip(numbers.tolist(), rows.tolist())]

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = shard_file(self.folder, number)
            with open_shard(path) as shard:
                self._shards[number] = self.load(shard, path)
        return self._shards[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # memory maps are not sent to worker processes
