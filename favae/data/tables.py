"""Data sets of the library `datasets`: of the hub, saved to disk, or in parquet files."""

import glob
import io
import logging
import os
import zlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from favae.data.captions import clean_captions
from favae.data.decoding import UnusableImage, image_extensions, read_image
from favae.data.folders import NO_LABELS, check_size, holds_only
from favae.data.images import MIN_SIZE, ImageIdentity
from favae.errors import DataError

logger = logging.getLogger(__name__)

HUB = "hf:"
ENDING = ".parquet"
SAVED_SET, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves in folders

AUTO, NONE = "auto", "none"  # names of columns
LABEL_COLUMN, CAPTION_COLUMN = "label", "caption"
TEXT_TYPES = ("string", "large_string")
BYTES_TYPES = ("binary", "large_binary")


class HuggingFaceSource:
    """The rows of a table. Columns that are not named are never read, labels and captions only if they are asked for.

    Args:
        path: "hf:NAME" of the hub, a folder that `save_to_disk` wrote, a .parquet file, or a folder of them.
        split: of a data set that has several; parquet files that are named themselves have none.
        image_column: of encoded images; "auto" takes "image", or else the only column that is declared to hold images.
        label_column: of classes. "auto" takes "label", "none" takes all images as one class.
        caption_column: of strings or lists of strings. "auto" takes "caption", if there is one.
        min_size: pixels that the shorter side of an image must have.

    Raises:
        DataError: if the data set cannot be opened or is empty, if a column is missing or not of the right type.
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
        import datasets

        self.path, self.min_size = path, min_size
        self.data = _open_dataset(path, split)
        self.image_column = self._find_image_column(image_column)
        self.label_column = self._find_column(label_column, LABEL_COLUMN)
        self._labels_are_expected = label_column != NONE
        self.caption_column = self._find_column(caption_column, CAPTION_COLUMN)

        # Columns are read one without the others. Images are decoded here, as everywhere, and not by `datasets`.
        column = self.image_column
        self._stored = self.data.select_columns(column).cast_column(column, datasets.Image(decode=False))
        first = self._stored[0][column]
        if first is not None and first["bytes"] is None and "://" in (first["path"] or ""):
            raise DataError(
                f"{path}: the column '{column}' holds addresses, such as {first['path']}; download the images into a "
                "folder or a parquet file (img2dataset does)"
            )

    def _find_column(self, name: str, usual: str) -> str | None:
        columns = self.data.column_names
        if name == NONE:
            return None
        if name == AUTO:
            return usual if usual in columns else None
        if name not in columns:
            raise DataError(f"{self.path}: no column '{name}', there are {', '.join(columns)}")
        return name

    def _find_image_column(self, name: str) -> str:
        """Raises `DataError` if there is no such column, or it does not hold images."""
        import datasets

        features = self.data.features
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        if name == AUTO:
            name = images[0] if len(images) == 1 and "image" not in features else "image"
        if name not in features:
            raise DataError(f"{self.path}: no column '{name}', there are {', '.join(features)}")
        feature = features[name]
        is_file = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        is_encoded = isinstance(feature, datasets.Value) and feature.dtype in (*BYTES_TYPES, *TEXT_TYPES)
        if not (name in images or is_file or is_encoded):
            raise DataError(
                f"{self.path}: the column '{name}' is of the type {_type_name(feature)}; it must hold an encoded "
                "image in each row, as bytes or as an Image of `datasets`"
            )
        return name

    @property
    def has_captions(self) -> bool:
        return self._captions is not None

    @cached_property
    def _captions(self) -> Any:
        """The column of captions alone, or None if there is none. Raises `DataError` if it does not hold texts."""
        if self.caption_column is None:
            return None
        feature = self.data.features[self.caption_column]
        inner = getattr(feature, "feature", feature)  # of a list
        if getattr(inner, "dtype", None) not in (*TEXT_TYPES, "null"):
            raise DataError(
                f"{self.path}: values of the caption column '{self.caption_column}' must be strings or lists of "
                f"strings, not {_type_name(feature)}; the caption column 'none' reads no captions"
            )
        return self.data.select_columns(self.caption_column)

    @property
    def classes(self) -> list[str]:
        return self._classes_and_labels[0]

    def label(self, index: int) -> int:
        return self._classes_and_labels[1][index]

    @cached_property
    def _classes_and_labels(self) -> tuple[list[str], list[int]]:
        """Names of the classes, and the class of each row: those that the column declares, or else its values."""
        column = self.label_column
        if column is None:
            if self._labels_are_expected:
                columns = ", ".join(self.data.column_names)
                logger.warning("%s: no column 'label', only %s: all images are of one class", self.path, columns)
            return ["image"], [0] * len(self)
        import datasets

        feature = self.data.features[column]
        has_one_value = isinstance(feature, datasets.Value | datasets.ClassLabel)
        if not has_one_value or not feature.dtype.startswith(("int", "uint", "bool", "string", "large_string")):
            raise DataError(
                f"{self.path}: the label column '{column}' is of the type {_type_name(feature)}; classes are integers "
                f"or strings; {NO_LABELS}"
            )
        labels = self.data.select_columns(column)[:][column]
        declared = getattr(feature, "names", None)
        values = list(range(len(declared))) if declared else sorted(set(labels) - {None})
        unknown = set(labels) - set(values)
        if unknown:  # test splits on the hub have -1
            value = unknown.pop()
            raise DataError(
                f"{self.path}: the label column '{column}' has {labels.count(value):,} values that are no class, such "
                f"as {value} in row {labels.index(value)}; {NO_LABELS}"
            )
        index = {value: i for i, value in enumerate(values)}
        return list(declared or map(str, values)), [index[label] for label in labels]

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def identity(self, index: int) -> ImageIdentity:
        size, time = self._stored_sizes[index], self._time
        if size == 0 and (path := (self._stored[index][self.image_column] or {}).get("path")):
            with suppress(OSError):
                size, time = os.stat(path).st_size, os.stat(path).st_mtime_ns
        return ImageIdentity(str(index), size, time)

    @cached_property
    def _time(self) -> int:
        """Of the last change of a file that is named itself; 0 for others."""
        file = Path(self.path)
        return file.stat().st_mtime_ns if file.is_file() else 0

    @cached_property
    def _stored_sizes(self) -> list[int]:
        """Bytes of each image, 0 for those that are not stored in the table."""
        from pyarrow import compute

        columns = (table[self.image_column] for table in self._stored.with_format("arrow").iter(batch_size=1000))
        sizes = (compute.binary_length(compute.struct_field(column, "bytes")).fill_null(0) for column in columns)
        return [size for part in sizes for size in part.to_pylist()]

    def checksum(self, index: int) -> int:
        return zlib.crc32(self._bytes(index))

    def _bytes(self, index: int) -> bytes:
        stored = self._stored[index][self.image_column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise UnusableImage("no image in this row")
        if stored["bytes"] is not None:
            return stored["bytes"]
        try:
            return Path(stored["path"]).read_bytes()
        except OSError as error:
            raise UnusableImage(str(error)) from error

    def read(self, index: int, channels: int = 3) -> Image.Image:
        image = read_image(io.BytesIO(self._bytes(index)), channels)
        check_size(image.size, self.min_size)
        return image

    def captions(self, index: int) -> list[str]:
        if self._captions is None:
            return []
        value = self._captions[index][self.caption_column]
        values = [value] if isinstance(value, str) else value or []
        return clean_captions([text for text in values if text is not None])


def _type_name(feature: Any) -> str:
    import datasets

    if isinstance(feature, dict):
        return f"struct of {', '.join(feature)}"
    if isinstance(feature, datasets.Value):
        return feature.dtype
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ if inner is None else f"{type(feature).__name__} of {_type_name(inner)}"


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def is_table(path: str) -> bool:
    """Whether `HuggingFaceSource` opens what is at this path, and not `FolderSource`."""
    if Path(path).is_dir():
        return _is_saved(Path(path)) or holds_only(path, ENDING, image_extensions())
    return path.startswith(HUB) or Path(path).suffix.lower() == ENDING


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAVED_SET, SAVED_SPLITS))


def _open_dataset(path: str, split: str) -> Any:
    """A `datasets.Dataset`."""
    import datasets

    try:
        data = _load(path, split)
    except DataError:
        raise
    except Exception as error:  # of files that are damaged, of another format, or of another structure
        if "corresponds to no data" in str(error) or "at least one table" in str(error):
            raise DataError(f"{path} is empty") from error
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise DataError(f"{path} ({split}) cannot be opened: {lines[0]}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"{path}: no split '{split}', there are {', '.join(data)}")
        data = data[split]
    if not len(data):
        raise DataError(f"{path} is empty")
    return data


def _load(path: str, split: str) -> Any:
    import datasets

    if path.startswith(HUB):
        if path == HUB:
            raise DataError(f"{HUB} must be followed by the name of a data set on the hub")
        return datasets.load_dataset(path.removeprefix(HUB), split=split)
    if Path(path).is_dir():
        if _is_saved(Path(path)):
            return datasets.load_from_disk(path)
        if glob.escape(path) != path:
            raise DataError(f"{path}: folders of shards cannot have *, ? or [ in their names; rename it")
        return datasets.load_dataset(path, split=split)
    files = glob.escape(path) if Path(path).is_file() else path  # others are patterns or addresses
    return datasets.load_dataset("parquet", data_files=files, split="train")
