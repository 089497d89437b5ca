"""Webdataset's tar shards, read where they are: nothing is unpacked, copied or kept in memory but where things lie."""

import glob
import io
import logging
import os
import re
import tarfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from favae.data.captions import clean_captions
from favae.data.decoding import UnusableImage, image_extensions, read_image
from favae.data.folders import NO_LABELS, check_size, ending_of, holds_only, printable, shown, walk
from favae.data.images import MIN_SIZE, ImageIdentity
from favae.data.tables import AUTO, NONE
from favae.errors import DataError

logger = logging.getLogger(__name__)

ENDING = ".tar"
NOWHERE = (0, -1)  # offset and size of a member that a row does not have
# Words in the names of files or folders that tell the split of a shard, as the library `datasets` has them.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class TarSource:
    """The rows of tar files: `key.jpg`, `key.cls` and `key.txt`, one after the other, are image, class and captions.

    All headers are read when the source is opened, and one member when it is asked for; images are decoded then, and
    too small ones refused. Rows without an image are counted in a warning.

    Args:
        path: a .tar file, a pattern of such, or a folder of them.
        split: of a folder, see `SPLIT_WORDS`; shards whose names tell no split are of "train".
        image_column, label_column, caption_column: what the names of members end in; "auto" for any image, "cls" and
            "txt". The latter two may be "none".
        min_size: pixels that the shorter side of an image must have.

    Attributes:
        shards: the files, sorted.

    Raises:
        DataError: if there is no shard or no image, or a file is damaged.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_column: str = AUTO,
        label_column: str = AUTO,
        caption_column: str = AUTO,
        min_size: int = MIN_SIZE,
    ):
        self.path, self.min_size, self._labels_are_expected = path, min_size, label_column != NONE
        self.shards = _find_shards(path, split)
        endings = image_extensions() if image_column == AUTO else {f".{image_column.lower()}"}
        wanted = {"label": (label_column, "cls"), "caption": (caption_column, "txt")}
        others = {
            kind: f".{usual if name == AUTO else name.lower()}"
            for kind, (name, usual) in wanted.items()
            if name != NONE
        }

        self._keys: list[str] = []
        self._firsts: list[int] = []  # the first row of each shard
        self._places = {
            kind: array("q") for kind in ("image", "label", "caption")
        }  # offset and size of each, or NOWHERE
        without: list[str] = []
        for shard in tqdm(self.shards, desc="shards", disable=len(self.shards) < 100):
            self._firsts.append(len(self._keys))
            for key, members in _rows(shard):
                image = next((ending for ending in members if ending in endings), None)
                if image is None:
                    without.append(key)
                    continue
                self._keys.append(key)
                for kind, ending in {"image": image, **others}.items():
                    self._places[kind].extend(members.get(ending, NOWHERE))
        if not self._keys:
            rows = f"has no image in its {len(without)} rows, such as {shown(without)}" if without else "is empty"
            raise DataError(f"{path} {rows}")
        if without:
            logger.warning("%s: left out %d rows without an image (%s)", path, len(without), shown(without))
        for kind, (name, _) in wanted.items():
            if name not in (AUTO, NONE) and not self._has(kind):
                raise DataError(f"{path}: no member ends in .{name}, which the {kind} column names")

    def __len__(self) -> int:
        return len(self._keys)

    def _has(self, kind: str) -> bool:
        """Whether any row has a label, or a caption."""
        return any(size >= 0 for size in self._places[kind][1::2])

    def _shard(self, index: int) -> int:
        return bisect_right(self._firsts, index) - 1

    def _bytes(self, kind: str, index: int) -> bytes | None:
        """The member of a row; None if there is none."""
        offset, size = self._places[kind][2 * index : 2 * index + 2] or NOWHERE
        if size < 0:
            return None
        with self.shards[self._shard(index)].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    @property
    def classes(self) -> list[str]:
        return self._classes_and_labels[0]

    def label(self, index: int) -> int:
        return self._classes_and_labels[1][index]

    @cached_property
    def _classes_and_labels(self) -> tuple[list[str], list[int]]:
        """Names of the classes, and the class of each row: numbers, or else texts, in their order."""
        if not self._has("label"):
            if self._labels_are_expected:
                logger.warning("%s: no member ends in .cls: all images are of one class", self.path)
            return ["image"], [0] * len(self)
        texts: list[str] = []
        for index in range(len(self)):
            data = self._bytes("label", index)
            if data is None:
                raise DataError(f"{self.name(index)} has no class, others have one; {NO_LABELS}")
            try:
                texts.append(data.decode("utf-8").strip())
            except UnicodeDecodeError:
                raise DataError(f"the class of {self.name(index)} is not UTF-8 text; {NO_LABELS}") from None
        values: list[str] = sorted(set(texts))
        if all(re.fullmatch(r"-?\d+", text) for text in values):
            values.sort(key=int)
        numbers = {value: number for number, value in enumerate(values)}
        return values, [numbers[text] for text in texts]

    def name(self, index: int) -> str:
        return printable(f"{self.shards[self._shard(index)]}/{self._keys[index]}")

    def identity(self, index: int) -> ImageIdentity:
        size, time = self._places["image"][2 * index + 1], self._times[self._shard(index)]
        return ImageIdentity(printable(self._keys[index]), size, time)

    @cached_property
    def _times(self) -> list[int]:
        return [shard.stat().st_mtime_ns for shard in self.shards]

    def checksum(self, index: int) -> int:
        return zlib.crc32(self._image(index))

    def _image(self, index: int) -> bytes:
        try:
            return self._bytes("image", index) or b""
        except OSError as error:
            raise UnusableImage(str(error)) from error

    def read(self, index: int, channels: int = 3) -> Image.Image:
        image = read_image(io.BytesIO(self._image(index)), channels)
        check_size(image.size, self.min_size)
        return image

    @cached_property
    def has_captions(self) -> bool:
        return self._has("caption")

    def captions(self, index: int) -> list[str]:
        """One in a line; none, with a warning, if they are not UTF-8."""
        data = self._bytes("caption", index) or b""
        try:
            return clean_captions(data.decode("utf-8-sig").splitlines())
        except UnicodeDecodeError:
            logger.warning("no captions of %s: they must be UTF-8 text, one caption per line", self.name(index))
            return []


def is_tar(path: str) -> bool:
    """Whether `TarSource` opens what is at this path: shards, or a folder with shards and no images or tables."""
    if not Path(path).is_dir():
        return path.lower().endswith(ENDING)
    return holds_only(path, ENDING, image_extensions() | {".parquet"})


def _find_shards(path: str, split: str) -> list[Path]:
    if not Path(path).is_dir():
        files = [Path(path)] if Path(path).is_file() else sorted(map(Path, glob.glob(path)))
        if not files:
            raise DataError(f"{path}: no such file")
        return files
    splits: dict[str, list[Path]] = {}
    shards = [Path(folder, name) for folder, names in walk(path) for name in names if ending_of(name) == ENDING]
    for file in sorted(shard for shard in shards if shard.is_file()):
        words = set(re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower()))
        name = next((name for name, usual in SPLIT_WORDS.items() if words & usual), "train")
        splits.setdefault(name, []).append(file)
    if split not in splits:
        raise DataError(f"{path}: no split '{split}', there are {', '.join(splits)}")
    return splits[split]


def _check_end(shard: Path, offset: int) -> None:
    """Raises `tarfile.ReadError` without the empty block there that ends an archive: `tarfile` does not mind."""
    with shard.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut off")


def _rows(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The rows of a shard: their keys, and for each ending in lower case the offset and size of the member."""
    key, members = "", dict[str, tuple[int, int]]()
    links: list[str] = []  # symbolic ones, which are left out
    places: dict[str, tuple[int, int]] = {}  # of all members, if there are hard links
    length = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                folder, name = os.path.split(info.name)
                stem, _, ending = name.partition(".")
                if info.issym():
                    links.append(info.name)
                if not (info.isfile() or info.islnk()) or not stem:
                    continue
                if info.islnk():
                    places = places or _places(shard)
                place = places.get(info.linkname) if info.islnk() else (info.offset_data, info.size)
                if place is None:
                    raise tarfile.ReadError(f"{printable(info.name)} is a link to nothing")
                if sum(place) > length:
                    raise tarfile.ReadError("it is cut off")
                if os.path.join(folder, stem) != key:
                    if members:
                        yield key, members
                    key, members = os.path.join(folder, stem), {}
                members[f".{ending.lower()}"] = place
            _check_end(shard, tar.offset)  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} cannot be opened: {error}") from error
    if members:
        yield key, members
    if links:
        logger.warning("%s: left out %d symbolic links (%s)", shard, len(links), shown(links))


def _places(shard: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each member by its name, for hard links, which name another one."""
    with tarfile.open(shard, "r:") as tar:
        return {info.name: (info.offset_data, info.size) for info in tar if not info.islnk()}
