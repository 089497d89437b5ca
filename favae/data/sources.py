"""Where images come from: a folder, a Hugging Face dataset, a parquet file, or the photographs inside some wheels.

A *source* reads image i as an RGB `PIL.Image`, and its captions; `favae.data.images` makes tensors of them.
"""

import importlib.util
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from favae.data.captions import clean_captions, read_caption_lines
from favae.data.images import READ_ERRORS, Source, UnusableImage, shorter_side_to, to_rgb
from favae.errors import DataError

logger = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


class FolderSource:
    """Every image below `path`; the class is the first folder below it (ImageFolder's layout), if there is one.

    The captions of `name.png` are the lines of `name.txt` beside it, in UTF-8; without such a file it has none.
    Headers are read once at the start: a file that is no image, or whose shorter side is below `min_size` pixels, is
    left out with a warning that names it.

    Attributes:
        files: those that are used. sizes: width and height of each, as stored.

    Raises:
        DataError: if the folder does not exist or nothing in it is usable.
    """

    def __init__(self, path: str | Path, min_size: int = 16):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{path}: no such folder")
        files = sorted(f for f in self.path.rglob("*") if _is_image(f) and f.is_file())
        self.files, self.sizes, skipped = [], [], 0
        for file in files:
            try:
                self.sizes.append(self._size(file, min_size))
                self.files.append(file)
            except READ_ERRORS as error:
                skipped += 1
                logger.warning("skipped %s: %s", file, error)
        if skipped:
            logger.warning("skipped %d of %d images in %s", skipped, len(files), path)
        if not self.files:
            raise DataError(f"{path}: no usable image ({len(files)} image files found, {skipped} skipped)")
        folders = [file.relative_to(self.path).parts[0] for file in self.files if file.parent != self.path]
        self.classes = sorted(set(folders)) or ["image"]
        if folders and len(folders) < len(self.files):
            raise DataError(f"{path}: some images are in class folders and some are not")
        index = {name: i for i, name in enumerate(self.classes)}
        self._labels = [index[name] for name in folders] or [0] * len(self.files)

    @staticmethod
    def _size(file: Path, min_size: int) -> tuple[int, int]:
        with Image.open(file) as image:
            if min(image.size) < min_size:
                size = f"{image.width}x{image.height} pixels"
                raise UnusableImage(f"{size}, the shorter side must have {min_size} (data.min_size)")
            return image.size

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return to_rgb(image)

    @property
    def has_captions(self) -> bool:
        return any(self.path.rglob("*.txt"))

    def captions(self, index: int) -> list[str]:
        """Raises `DataError` for a file that is not UTF-8."""
        return read_caption_lines(self.files[index].with_suffix(".txt"))


class HuggingFaceSource:
    """A dataset of the `datasets` library, from the hub or from a local parquet file.

    Captions are strings or lists of strings; without such a column no image has any.

    Raises:
        DataError: if a column is missing.
    """

    def __init__(self, path: str, split: str, image_column: str, label_column: str, caption_column: str | None = None):
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
        if image_column not in data.column_names:
            raise DataError(
                f"{path}: no column '{image_column}' (data.image_column), there are {', '.join(data.column_names)}"
            )
        self.path = path
        self.data = data.cast_column(image_column, datasets.Image())
        self.image_column = image_column
        if caption_column is not None and caption_column not in data.column_names:
            raise DataError(
                f"{path}: no column '{caption_column}' (--caption-column), there are {', '.join(data.column_names)}"
            )
        self.caption_column = caption_column or "caption"
        self.has_captions = self.caption_column in data.column_names
        self._captions = data.select_columns(self.caption_column) if self.has_captions else None
        labels = data[label_column] if label_column in data.column_names else [0] * len(data)
        if any(label is None for label in labels):
            raise DataError(f"{path}: some values of '{label_column}' (data.label_column) are missing")
        feature = data.features.get(label_column)
        named = getattr(feature, "names", None)
        self.classes = list(named or map(str, sorted(set(labels))))
        index = {value: i for i, value in enumerate(range(len(named)) if named else sorted(set(labels)))}
        unknown = sorted(set(labels) - set(index))
        if unknown:  # -1 in test splits of the hub
            raise DataError(f"{path} ({split}): label {unknown[0]} is no class; this split has no labels to use")
        self._labels = [index[value] for value in labels]

    def __len__(self) -> int:
        return len(self.data)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def read(self, index: int) -> Image.Image:
        image = self.data[index][self.image_column]
        if image is None:
            raise UnusableImage("no image in this row")
        return to_rgb(image)

    def captions(self, index: int) -> list[str]:
        """Raises `DataError` for values that are no text."""
        if self._captions is None:
            return []
        value = self._captions[index][self.caption_column] or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise DataError(
                f"{self.name(index)}: the values of '{self.caption_column}' (--caption-column) must be strings or "
                "lists of strings"
            )
        return clean_captions(values)


class PhotoSource:
    """Square crops of photographs that are inside the wheels of scikit-image, matplotlib and scikit-learn.

    The class is the photograph, the caption its description. Splits: "train" takes crops from the left three quarters
    of each photograph, "validation" from the right quarter, "heldout" from two photographs that the other splits never
    touch, and "test" from three more, looked at for one setting only (docs/results.md). Crop i is a pure function of i:
    its photograph is i modulo their number, its side is log-uniform between 64 pixels and the region's shorter side.

    Args:
        split: one of `SPLITS`.
        size: the number of crops; None takes the split's default.

    Raises:
        DataError: if the split is unknown, or the package with its photographs is not installed.
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
    SPLITS = {"train": 1024, "validation": 128, "heldout": 128, "test": 128}
    WHOLE = {"heldout": ("cat", "gravel"), "test": ("officer", "pavilion", "dahlia")}
    TRAIN_SHARE = 0.75

    def __init__(self, split: str = "train", size: int | None = None):
        if split not in self.SPLITS:
            raise DataError(f"photos: no split '{split}', there are {', '.join(self.SPLITS)}")
        self.split = split
        self.size = size or self.SPLITS[split]
        elsewhere = [name for names in self.WHOLE.values() for name in names]
        self.classes = list(self.WHOLE.get(split, [name for name in self.PHOTOS if name not in elsewhere]))
        self._regions = [self._region(name) for name in self.classes]

    def _region(self, name: str) -> Image.Image:
        package, _, file = self.PHOTOS[name][0].partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise DataError(f"photos:{self.split} needs the photographs inside {package}; pip install favae[offline]")
        with Image.open(Path(spec.submodule_search_locations[0]) / file) as image:
            image = to_rgb(image)
        if min(image.size) > 512:  # so that a crop of the largest photographs still shows something
            image = shorter_side_to(image, 512)
        seam = round(self.TRAIN_SHARE * image.width)
        if self.split == "train":
            return image.crop((0, 0, seam, image.height))
        if self.split == "validation":
            return image.crop((seam, 0, image.width, image.height))
        return image

    def __len__(self) -> int:
        return self.size

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def name(self, index: int) -> str:
        return f"photos:{self.split}[{index}]"

    def read(self, index: int) -> Image.Image:
        region = self._regions[self.label(index)]
        rng = np.random.default_rng([index, list(self.SPLITS).index(self.split)])
        longest = min(region.size)
        side = round(64 * (longest / 64) ** rng.random())
        left, top = rng.integers(region.width - side + 1), rng.integers(region.height - side + 1)
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
        path: "photos" (built in), a folder, a .parquet file, or "hf:NAME" for a dataset of the Hugging Face hub.
            ":SPLIT" may follow "photos" and stands for `split`.
        split: of "photos" and of hub datasets.
        image_column, label_column, caption_column: of parquet files and hub datasets; without a label column all images
            are class 0; captions are in a column "caption", if there is one, unless another is named.
        min_size: images of a folder with a shorter side than this many pixels are skipped.

    Raises:
        DataError: if there is nothing usable.
    """
    if path == "photos" or path.startswith("photos:"):
        return PhotoSource(path.partition(":")[2] or split)
    if path.startswith("hf:"):
        return HuggingFaceSource(path.removeprefix("hf:"), split, image_column, label_column, caption_column)
    if path.endswith(".parquet"):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
        return HuggingFaceSource(path, split, image_column, label_column, caption_column)
    return FolderSource(path, min_size)
