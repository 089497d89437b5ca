"""Where images come from, by one name: a folder, a data set of the `datasets` library, or photographs in wheels.

A source gives image i as a `PIL.Image` (gray, RGB or RGBA), its class and its captions; `favae.data.images` makes
tensors of images.
"""

import logging
from pathlib import Path

from favae.data.folders import FolderSource, check_name
from favae.data.images import Source
from favae.data.photos import PhotoSource
from favae.data.tables import AUTO, NONE, HuggingFaceSource, is_table
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
    min_size: int = 16,
) -> Source:
    """Opens images by one name.

    Args:
        path: "photos" for those built in, a folder of images, or what `HuggingFaceSource` opens. ":SPLIT" may follow
            "photos", in place of `split`.
        split: of "photos", of data sets on the hub, and of folders with splits in them.
        image_column, label_column, caption_column: names of columns, or "auto"; the latter two may be "none", also of
            folders. See `HuggingFaceSource`. Sources without columns refuse names of columns.
        min_size: of images that are not built in, see `FolderSource`.

    Raises:
        DataError: if there is nothing usable.
    """
    check_name(path)
    is_built_in = path == PHOTOS or path.startswith(f"{PHOTOS}:")
    if not is_built_in and is_table(path):
        return HuggingFaceSource(path, split, image_column, label_column, caption_column, min_size)
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
