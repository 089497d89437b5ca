"""Where images come from, by one name: a folder, tar shards, a data set of `datasets`, or photographs in wheels.

A source gives image i as a `PIL.Image` (gray, RGB or RGBA), its class and its captions; `favae.data.images` makes
tensors of images.
"""

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from favae.data.folders import FolderSource, check_name
from favae.data.images import MIN_SIZE, ImageIdentity, Source
from favae.data.photos import PhotoSource
from favae.data.tables import AUTO, HUB, NONE, HuggingFaceSource, is_table
from favae.data.tar_shards import TarSource, is_tar
from favae.errors import DataError

logger = logging.getLogger(__name__)

PHOTOS = "photos"


def open_source(
    path: str,
    split: str = "train",
    *,
    image_column: str = AUTO,
    label_column: str = AUTO,
    caption_column: str = AUTO,
    min_size: int = MIN_SIZE,
) -> Source:
    """Opens images by one name.

    Args:
        path: "photos" for those built in, a folder of images, or what `TarSource` and `HuggingFaceSource` open.
            ":SPLIT" may follow "photos" and names on the hub, in place of `split`.
        split: of "photos", of data sets on the hub, and of folders with splits in them.
        image_column, label_column, caption_column: names of columns, or "auto"; the latter two may be "none", also of
            folders. See `HuggingFaceSource` and `TarSource`. Sources without columns refuse names of columns.
        min_size: of images that are not built in, see `FolderSource`.

    Raises:
        DataError: if there is nothing usable.
    """
    check_name(path)
    is_built_in = path == PHOTOS or path.startswith(f"{PHOTOS}:")
    if path.startswith(HUB):
        name, _, named = path.removeprefix(HUB).partition(":")
        path, split = HUB + name, named or split
    if not is_built_in and has_columns(path):
        kind = TarSource if is_tar(path) else HuggingFaceSource
        return kind(path, split, image_column, label_column, caption_column, min_size)
    for column, own in ((image_column, "image"), (label_column, "label"), (caption_column, "caption")):
        if column not in (AUTO, own) and (is_built_in or column != NONE):
            raise DataError(f"{path} has no columns, so none is called '{column}'; leave the column at 'auto'")
    if is_built_in:
        if Path(PHOTOS).is_dir():
            logger.warning("%s: the photographs that are built in are taken; ./%s is the folder", path, PHOTOS)
        return PhotoSource(path.partition(":")[2] or split)
    if Path(path).is_file():
        raise DataError(
            f"{path} is a file; sets of images are folders (unpack archives), .parquet files, webdataset's .tar files, "
            "folders that `save_to_disk` wrote, or hf:NAME"
        )
    return FolderSource(path, min_size, labels=label_column != NONE, captions=caption_column != NONE)


def has_columns(path: str) -> bool:
    """Whether images at this path are rows of tables or of tar shards."""
    return is_table(path) or is_tar(path)


def has_splits(path: str) -> bool:
    """Whether what is at this path may have several splits, and does not name one."""
    is_hub = path.startswith(HUB) and path.count(":") == 1
    return path == PHOTOS or is_hub or (Path(path).is_dir() and has_columns(path))


class Selection:
    """Images of a source at even distances, as a source.

    Args:
        count: how many, at most.
    """

    def __init__(self, source: Source, count: int):
        self.source = source
        self.indices = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def has_captions(self) -> bool:
        return self.source.has_captions

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def identity(self, index: int) -> ImageIdentity:
        return self.source.identity(self.indices[index])

    def checksum(self, index: int) -> int:
        return self.source.checksum(self.indices[index])

    def read(self, index: int, channels: int = 3) -> Image.Image:
        return self.source.read(self.indices[index], channels)

    def captions(self, index: int) -> list[str]:
        return self.source.captions(self.indices[index])
