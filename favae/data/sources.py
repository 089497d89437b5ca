"""Where images come from: a folder, a Hugging Face dataset, a parquet file, or the photographs inside some wheels.

A source gives image i as an RGB `PIL.Image`, its class and its captions; `favae.data.images` makes tensors of images.
"""

import importlib.util
import logging
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from favae.data.captions import clean_captions, read_caption_lines
from favae.data.images import READ_ERRORS, ImageIdentity, Source, UnusableImage, shorter_side_to, to_rgb
from favae.errors import DataError

logger = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


class FolderSource:
    """Every image below a folder. Its first folder level is the class, if it has one, as in torchvision's ImageFolder.

    The captions of `name.png` are the lines of `name.txt` beside it. All headers are read when the source is opened: a
    file that is no image, or is too small, is left out with a warning that names it. Files whose names begin with "."
    are ignored.

    Args:
        path: of the folder.
        min_size: pixels that the shorter side of an image must have.

    Attributes:
        files: those that are used. sizes: width and height of each. classes: names of the class folders, sorted.

    Raises:
        DataError: if the folder does not exist, if it has no usable image, or if only some images are in class folders.
    """

    def __init__(self, path: str | Path, min_size: int = 16):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{path}: no such folder")

        # Files whose headers can be read.
        files = sorted(file for file in self.path.rglob("*") if _is_image(file) and file.is_file())
        self.files: list[Path] = []
        self.sizes: list[tuple[int, int]] = []
        for file in files:
            try:
                self.sizes.append(_image_size(file, min_size))
                self.files.append(file)
            except READ_ERRORS as error:
                logger.warning("skipped %s: %s", file, error)
        skipped = len(files) - len(self.files)
        if skipped:
            logger.warning("skipped %d of %d images in %s", skipped, len(files), path)
        if not self.files:
            raise DataError(f"{path}: no usable image ({len(files)} image files found, {skipped} skipped)")

        # Classes.
        folders = [file.relative_to(self.path).parts[0] for file in self.files if file.parent != self.path]
        if folders and len(folders) < len(self.files):
            raise DataError(f"{path}: some images are in class folders and some are not")
        self.classes = sorted(set(folders)) or ["image"]
        index = {name: i for i, name in enumerate(self.classes)}
        self._labels = [index[name] for name in folders] or [0] * len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return str(self.files[index])

    def identity(self, index: int) -> ImageIdentity:
        file = self.files[index]
        stat = file.stat()
        return ImageIdentity(file.relative_to(self.path).as_posix(), stat.st_size, stat.st_mtime_ns)

    def checksum(self, index: int) -> int:
        return zlib.crc32(self.files[index].read_bytes())

    def read(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return to_rgb(image)

    @property
    def has_captions(self) -> bool:
        return any(self.path.rglob("*.txt"))

    def captions(self, index: int) -> list[str]:
        """Raises `DataError` if the file with the captions is not UTF-8."""
        return read_caption_lines(self.files[index].with_suffix(".txt"))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


def _image_size(file: Path, min_size: int) -> tuple[int, int]:
    """Width and height, from the header alone."""
    with Image.open(file) as image:
        if min(image.size) < min_size:
            raise UnusableImage(
                f"{image.width} x {image.height} pixels, but the shorter side must have at least {min_size}"
            )
        return image.size


class HuggingFaceSource:
    """A data set of the `datasets` library: one of the hub, or a local parquet file.

    Args:
        path: name on the hub, or a file that ends in ".parquet".
        split: of a data set on the hub.
        image_column, label_column: their names. Without a label column, all images are of class 0.
        caption_column: with strings or lists of strings; None takes "caption", if there is such a column.

    Raises:
        DataError: if the data set cannot be opened or is empty, if a column is missing, or labels are.
    """

    def __init__(self, path: str, split: str, image_column: str, label_column: str, caption_column: str | None = None):
        import datasets

        self.path = path
        data = _open_dataset(path, split)
        for column in (image_column, caption_column):
            if column is not None and column not in data.column_names:
                raise DataError(f"{path}: no column '{column}', there are {', '.join(data.column_names)}")
        self.image_column = image_column
        self.caption_column = caption_column or "caption"
        self.has_captions = self.caption_column in data.column_names
        self.classes, self._labels = _read_labels(data, label_column, f"{path} ({split})")

        self.data = data.cast_column(image_column, datasets.Image())
        self._stored = data.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        # Captions are read without their images.
        self._captions = data.select_columns(self.caption_column) if self.has_captions else None

    def __len__(self) -> int:
        return len(self.data)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def identity(self, index: int) -> ImageIdentity:
        time = Path(self.path).stat().st_mtime_ns if self.path.endswith(".parquet") else 0
        return ImageIdentity(str(index), self._stored_sizes[index], time)

    @cached_property
    def _stored_sizes(self) -> list[int]:
        """Bytes of each image, 0 for those that are not stored in the table."""
        from pyarrow import compute

        columns = (table[self.image_column] for table in self._stored.with_format("arrow").iter(batch_size=1000))
        sizes = (compute.binary_length(compute.struct_field(column, "bytes")).fill_null(0) for column in columns)
        return [size for part in sizes for size in part.to_pylist()]

    def checksum(self, index: int) -> int:
        stored = self._stored[index][self.image_column] or {}
        if stored.get("bytes") is not None:
            return zlib.crc32(stored["bytes"])
        return zlib.crc32(self.read(index).tobytes())  # a file beside the table, or on the web

    def read(self, index: int) -> Image.Image:
        image = self.data[index][self.image_column]
        if image is None:
            raise UnusableImage("no image in this row")
        return to_rgb(image)

    def captions(self, index: int) -> list[str]:
        """Raises `DataError` if the value is not text."""
        if self._captions is None:
            return []
        value = self._captions[index][self.caption_column] or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise DataError(
                f"{self.name(index)}: values of the caption column '{self.caption_column}' must be strings or lists of "
                "strings"
            )
        return clean_captions(values)


def _open_dataset(path: str, split: str) -> Any:
    """A `datasets.Dataset`."""
    import datasets

    try:
        if path.endswith(".parquet"):
            data = datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            data = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path} ({split}) cannot be opened: {str(error).splitlines()[0]}") from error
    if not len(data):
        raise DataError(f"{path} ({split}) is empty")
    return data


def _read_labels(data: Any, column: str, name: str) -> tuple[list[str], list[int]]:
    """Names of the classes, and the class of each row: those that the column declares, or else its different values."""
    labels = data[column] if column in data.column_names else [0] * len(data)
    declared = getattr(data.features.get(column), "names", None)
    values = list(range(len(declared))) if declared else sorted(set(labels) - {None})
    unknown = set(labels) - set(values)
    if unknown:  # test splits on the hub have -1
        raise DataError(f"{name}: the label column '{column}' has values that are no class, such as {unknown.pop()}")
    index = {value: i for i, value in enumerate(values)}
    return list(declared or map(str, values)), [index[label] for label in labels]


class PhotoSource:
    """Square crops of photographs that are inside the wheels of scikit-image, matplotlib and scikit-learn.

    The class is the photograph, the caption its description. The split "train" takes crops from the left three quarters
    of each photograph, "validation" from the right quarter, "heldout" from two photographs that the other splits never
    touch, and "test" from three more, looked at for one setting only (docs/results.md). Crop i is a function of i
    alone: its photograph is i modulo their number, its side is log-uniform between 64 pixels and the region's shorter
    side.

    Args:
        split: one of `NUM_CROPS_BY_SPLIT`.
        size: the number of crops; None takes the split's default.

    Raises:
        DataError: if there is no such split, or the package with a photograph is not installed.
    """

    has_captions = True
    PHOTOS = {  # name: (file, description)
        "astronaut": ("skimage/data/astronaut.png", "a smiling astronaut in an orange suit"),
        "brick": ("skimage/data/brick.png", "a brick wall"),
        "cat": ("skimage/data/chelsea.png", "the face of a tabby cat"),
        "coffee": ("skimage/data/coffee.png", "a cup of coffee on a wooden table"),
        "galaxies": ("skimage/data/hubble_deep_field.jpg", "distant galaxies in the Hubble deep field"),
        "grass": ("skimage/data/grass.png", "a patch of grass"),
        "gravel": ("skimage/data/gravel.png", "a patch of gravel"),
        "motorcycle": ("skimage/data/motorcycle_left.png", "a motorcycle in a workshop"),
        "retina": ("skimage/data/retina.jpg", "the retina of an eye"),
        "rocket": ("skimage/data/rocket.jpg", "a rocket on its launch pad at night"),
        "tissue": ("skimage/data/ihc.png", "stained tissue under a microscope"),
        "officer": ("matplotlib/mpl-data/sample_data/grace_hopper.jpg", "a naval officer before a flag"),
        "pavilion": ("sklearn/datasets/images/china.jpg", "a Chinese pavilion under a blue sky"),
        "dahlia": ("sklearn/datasets/images/flower.jpg", "an orange dahlia"),
    }
    NUM_CROPS_BY_SPLIT = {"train": 1024, "validation": 128, "heldout": 128, "test": 128}
    WHOLE_PHOTOS_BY_SPLIT = {"heldout": ("cat", "gravel"), "test": ("officer", "pavilion", "dahlia")}
    TRAIN_SHARE = 0.75  # of the width of each photograph that "train" and "validation" divide

    def __init__(self, split: str = "train", size: int | None = None):
        if split not in self.NUM_CROPS_BY_SPLIT:
            raise DataError(f"photos: no split '{split}', there are {', '.join(self.NUM_CROPS_BY_SPLIT)}")
        self.split = split
        self.size = size or self.NUM_CROPS_BY_SPLIT[split]
        elsewhere = [name for names in self.WHOLE_PHOTOS_BY_SPLIT.values() for name in names]
        divided = [name for name in self.PHOTOS if name not in elsewhere]
        self.classes = list(self.WHOLE_PHOTOS_BY_SPLIT.get(split, divided))
        self._regions = [self._region(name) for name in self.classes]

    def _region(self, name: str) -> Image.Image:
        """The part of a photograph that belongs to the split."""
        package, _, file = self.PHOTOS[name][0].partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"photos:{self.split} needs the photographs inside {package}; pip install favae[offline]")
        with Image.open(Path(spec.submodule_search_locations[0]) / file) as opened:
            image = to_rgb(opened)
        if min(image.size) > 512:  # so that a small crop of a large photograph still shows something
            image = shorter_side_to(image, 512)
        boundary = round(self.TRAIN_SHARE * image.width)
        if self.split == "train":
            return image.crop((0, 0, boundary, image.height))
        if self.split == "validation":
            return image.crop((boundary, 0, image.width, image.height))
        return image

    def __len__(self) -> int:
        return self.size

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def name(self, index: int) -> str:
        return f"photos:{self.split}[{index}]"

    def identity(self, index: int) -> ImageIdentity:
        return ImageIdentity(self.name(index), 0, 0)

    def checksum(self, index: int) -> int:
        return zlib.crc32(self.read(index).tobytes())

    def read(self, index: int) -> Image.Image:
        region = self._regions[self.label(index)]
        rng = np.random.default_rng([index, list(self.NUM_CROPS_BY_SPLIT).index(self.split)])
        longest = min(region.size)
        side = round(64 * (longest / 64) ** rng.random())
        left, top = int(rng.integers(region.width - side + 1)), int(rng.integers(region.height - side + 1))
        return region.crop((left, top, left + side, top + side))

    def captions(self, index: int) -> list[str]:
        return clean_captions([self.PHOTOS[self.classes[self.label(index)]][1]])


def open_source(
    path: str,
    split: str = "train",
    *,
    image_column: str = "image",
    label_column: str = "label",
    caption_column: str | None = None,
    min_size: int = 16,
) -> Source:
    """Opens images by one name.

    Args:
        path: "photos" for those built in, a folder, a .parquet file, or "hf:NAME" for a data set of the Hugging Face
            hub. ":SPLIT" may follow "photos", in place of `split`.
        split: of "photos" and of data sets on the hub.
        image_column, label_column, caption_column: of parquet files and the hub, see `HuggingFaceSource`.
        min_size: of folders, see `FolderSource`.

    Raises:
        DataError: if there is nothing usable.
    """
    if path == "photos" or path.startswith("photos:"):
        return PhotoSource(path.partition(":")[2] or split)
    if path.startswith("hf:"):
        return HuggingFaceSource(path.removeprefix("hf:"), split, image_column, label_column, caption_column)
    if path.endswith(".parquet"):
        return HuggingFaceSource(path, split, image_column, label_column, caption_column)
    return FolderSource(path, min_size)
