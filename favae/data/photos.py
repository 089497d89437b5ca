"""Photographs that are inside some wheels, so that nothing must be downloaded."""

import importlib.util
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from favae.channels import MODES
from favae.data.captions import clean_captions
from favae.data.decoding import read_image
from favae.data.images import ImageIdentity, shorter_side_to
from favae.errors import DataError


class PhotoSource:
    """Square crops of photographs that are inside the wheels of scikit-image, matplotlib and scikit-learn.

    The class is the photograph, the caption its description. The split "train" takes crops from the left three quarters
    of each photograph, "validation" from the right quarter, "heldout" from two photographs that the other splits never
    touch, and "test" from three more, looked at for one setting only (docs/results_short_trainings.md). Crop i is a
    function of i alone: its photograph is i modulo their number, its side is log-uniform between 64 pixels and the
    region's shorter side.

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
        image = read_image(Path(spec.submodule_search_locations[0]) / file)
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

    def read(self, index: int, channels: int = 3) -> Image.Image:
        region = self._regions[self.label(index)]
        rng = np.random.default_rng([index, list(self.NUM_CROPS_BY_SPLIT).index(self.split)])
        longest = min(region.size)
        side = round(64 * (longest / 64) ** rng.random())
        left, top = int(rng.integers(region.width - side + 1)), int(rng.integers(region.height - side + 1))
        return region.crop((left, top, left + side, top + side)).convert(MODES[channels])

    def captions(self, index: int) -> list[str]:
        return clean_captions([self.PHOTOS[self.classes[self.label(index)]][1]])
