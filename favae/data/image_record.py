"""Which images a latent cache was made of: a record of their names, sizes, times and classes, and what is compared.

The record is `images.json.gz` in the folder of the cache. It holds five lists in JSON, with an entry for each image of
the set in its order, but for the last: "names", "sizes" and "times" (see `ImageIdentity`), "labels" and "classes". A
shard has the CRC-32 of the bytes that each of its images was stored in ("checksums").

Names, sizes and classes must agree. Times may differ, because copies have other ones: of the images whose time differs,
at most `MAX_READ` are read, and their checksums must agree. Without the record, that and their number is compared.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from torch.utils.data import Dataset
from tqdm import tqdm

from favae.data.decoding import UnusableImage
from favae.data.images import ImageDataset, Source
from favae.data.sharded_cache import open_shard
from favae.errors import CacheError

RECORD_FILE = "images.json.gz"
MAX_READ = 1000


@dataclass
class ImageRecord:
    """What is known about all images of a set without decoding them."""

    names: list[str]
    sizes: list[int]
    times: list[int]
    labels: list[int]
    classes: list[str]

    @classmethod
    def of(cls, source: Source) -> "ImageRecord":
        identities = [source.identity(index) for index in range(len(source))]
        names, sizes, times = map(list, zip(*identities)) if identities else ([], [], [])
        labels = [source.label(index) for index in range(len(source))]
        return cls(names, sizes, times, labels, list(source.classes))

    @classmethod
    def read(cls, folder: Path) -> "ImageRecord | None":
        """The record in the folder of a cache; None if there is none.

        Raises:
            CacheError: if it is damaged.
        """
        file = folder / RECORD_FILE
        if not file.is_file():
            return None
        try:
            return TypeAdapter(cls).validate_json(gzip.decompress(file.read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise CacheError(
                f"{file} is damaged; delete it if you are sure that the images are those that {folder} was made of"
            ) from error

    def write(self, file: Path) -> None:
        # Without the time of writing, so that the same images have the same file.
        file.write_bytes(gzip.compress(json.dumps(asdict(self)).encode(), compresslevel=4, mtime=0))

    def digest(self) -> str:
        """SHA-256 of all but times: copies of the same images have the same."""
        known = {key: value for key, value in asdict(self).items() if key != "times"}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def difference(self, other: "ImageRecord") -> str | None:
        """The first thing in which another record differs from this one, apart from times, in words."""
        for index, (name, new_name) in enumerate(zip(self.names, other.names)):
            if name != new_name:
                return f"image {index} was {name} and is {new_name}"
        if len(self.names) != len(other.names):
            return f"there were {len(self.names):,} images and are {len(other.names):,}"
        for name, size, now in zip(self.names, self.sizes, other.sizes):
            if size != now:
                return f"{name} had {size:,} bytes and has {now:,}"
        if self.classes != other.classes:
            return f"the classes were {_some(self.classes)} and are {_some(other.classes)}"
        for name, label, now in zip(self.names, self.labels, other.labels):
            if label != now:
                return f"{name} was of class {self.classes[label]} and is of class {self.classes[now]}"
        return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")


class RecordedImages(Dataset):
    """Items of an `ImageDataset` that also have "label", and "checksum", of the bytes that store the image."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict | None:
        item = self.images[index]
        source = self.images.source
        return item and {**item, "label": source.label(index), "checksum": source.checksum(index)}


def check_images(
    folder: Path, shards: Iterable[Path], count: int | None, source: Source, *, read_all: bool = False
) -> None:
    """Compares images with those that a latent cache was made of.

    Args:
        folder: of the cache, finished or not.
        shards: its files; those that are not written yet are left out.
        count: the number of images, as the plan or the manifest has it.
        source: the images.
        read_all: compares the bytes of every image, and not only of some whose time differs.
    Raises:
        CacheError: if they are other images, or the record is damaged.
    """
    record = ImageRecord.read(folder)
    if record is None:
        difference = None if len(source) == count else f"there were {count} images and are {len(source)}"
        has_changed = np.ones(len(source), bool)  # as far as is known
    else:
        now = ImageRecord.of(source)
        difference = record.difference(now)
        has_changed = np.array([time != new for time, new in zip(record.times, now.times)], bool)
    if difference is not None:
        raise _refusal(folder, difference)
    to_read = np.arange(len(source)) if read_all else np.flatnonzero(has_changed)
    if not read_all and len(to_read) > MAX_READ:
        to_read = to_read[np.linspace(0, len(to_read) - 1, MAX_READ).astype(int)]
    checksums = stored_checksums(shards) if len(to_read) else {}
    stored = [index for index in to_read.tolist() if index in checksums]
    for index in tqdm(stored, desc="images", disable=not (read_all and stored)):
        if _checksum(source, index) != checksums[index]:
            raise _refusal(folder, f"{source.identity(index).name} has other bytes than before")


def _refusal(folder: Path, difference: str) -> CacheError:
    return CacheError(
        f"{folder} was made of other images: {difference}; give the same images with the same options, or choose "
        "another folder"
    )


def _checksum(source: Source, index: int) -> int | None:
    try:
        return source.checksum(index)
    except (UnusableImage, OSError):
        return None


def stored_checksums(shards: Iterable[Path]) -> dict[int, int]:
    """The checksum of each image that was encoded, by its index in the set."""
    found: dict[int, int] = {}
    for path in shards:
        if path.exists():
            with open_shard(path) as shard:
                found |= zip(shard.get_tensor("indices").tolist(), shard.get_tensor("checksums").tolist())
    return found
