"""What generated images are compared with: real images, or statistics of them.

`favae reference-statistics` writes the statistics of a set of images once. The reference of `favae evaluate generation`
is such a file, a folder or any other source of images, an .npz file of images, or ADM's statistics (mu, sigma, mu_s,
sigma_s, arr_0).
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from favae.data.images import ImageDataset, Source
from favae.errors import DataError
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import INCEPTION, FeatureExtractor
from favae.eval.image_sets import IMAGES_KEY, CroppedImages, NpzImages, npz_names, read_npz
from favae.files import READ_ERRORS, atomic_path
from favae.hashing import hash_file

logger = logging.getLogger(__name__)

NUM_REFERENCE_FEATURES = 10_000  # images that precision, recall and KID use, as in ADM's evaluator
ARRAYS = ("mean", "covariance", "spatial_mean", "spatial_covariance", "features", "differences")


class Reference:
    """The real images, or statistics, at a path.

    What can be checked is checked when it is made, before samples that take hours are made for it.

    Args:
        path: a .safetensors file of `save_statistics`, an .npz file, or the name of a data source.
        extractors: whose features are compared.
        open_images: opens the data source; without it, a source is refused.
    Raises:
        DataError: if it is missing or damaged, or of other features.
    """

    def __init__(
        self,
        path: str,
        extractors: Sequence[FeatureExtractor],
        open_images: Callable[[], Source] | None = None,
    ):
        self.path, self.extractors = path, extractors
        self.loaded = self.names = self.source = None
        self.size: tuple[int, int] | None = None  # height and width, where they are known
        if path.endswith(".safetensors"):
            description, self.loaded = load_statistics(path, extractors)
            self.size = (description["resolution"],) * 2
        elif path.endswith(".npz"):
            self.names = npz_names(path)
            self._check_names()
            if IMAGES_KEY not in self.names and any(extractor.name != INCEPTION for extractor in extractors):
                raise DataError(f"{path} has no images ({IMAGES_KEY}); its statistics are of {INCEPTION} features only")
            if "mu" in self.names and any(extractor.name != INCEPTION for extractor in extractors):
                logger.warning(
                    "%s has statistics of %s features of all images; distances of other features are to the images of "
                    "its %s alone, and larger for it",
                    path,
                    INCEPTION,
                    IMAGES_KEY,
                )
        elif open_images is None:
            raise DataError(f"{path}: expected a .safetensors or an .npz file of statistics")
        else:
            self.source = open_images()

    def statistics(self, size: tuple[int, int], *, batch_size: int = 32, num_workers: int = 0) -> list[ImageStatistics]:
        """The statistics of each extractor's features. All processes take part.

        Args:
            size: height and width of the images that are compared with it.
        Raises:
            DataError: if it is of another size.
        """
        self.check_size(size)
        loading = {"description": "reference", "batch_size": batch_size, "num_workers": num_workers}
        if self.loaded is not None:
            return self.loaded
        if self.names is not None:
            return self._from_npz(loading)
        images = CroppedImages(ImageDataset(self.source, size[0]))
        return image_statistics(images, self.extractors, keep=NUM_REFERENCE_FEATURES, **loading)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises `DataError` if images of this height and width cannot be compared with it."""
        height, width = size
        if self.source is not None and height != width:
            raise DataError(
                f"these images have {width} x {height} pixels, but the center crops of {self.path} are square"
            )
        if self.size is not None and self.size != tuple(size):
            raise DataError(
                f"{self.path} is of images of {self.size[1]} x {self.size[0]} pixels, these have {width} x {height}"
            )

    def _from_npz(self, loading: dict) -> list[ImageStatistics]:
        """Statistics of images, or ADM's: Inception's, of all real images, with 10,000 of these in `arr_0`."""
        found: list[ImageStatistics | None] = [None] * len(self.extractors)
        if IMAGES_KEY in self.names:
            images = NpzImages(self.path)
            found = image_statistics(images, self.extractors, keep=NUM_REFERENCE_FEATURES, **loading)
        for i, extractor in enumerate(self.extractors):
            if extractor.name == INCEPTION and "mu" in self.names:
                found[i] = self._adm_statistics(found[i])
        return found

    def _adm_statistics(self, images: ImageStatistics | None) -> ImageStatistics:
        """ADM's statistics, with features and seams of the images that the file has, if it has any."""
        spatial = [read_npz(self.path, key) for key in ("mu_s", "sigma_s")] if "mu_s" in self.names else [None, None]
        return ImageStatistics(
            extractor=INCEPTION,
            hash=hash_file(self.path),
            count=None,
            mean=read_npz(self.path, "mu"),
            covariance=read_npz(self.path, "sigma"),
            spatial_mean=spatial[0],
            spatial_covariance=spatial[1],
            features=images and images.features,
            differences=images and images.differences,
        )

    def _check_names(self) -> None:
        if IMAGES_KEY in self.names:
            self.size = NpzImages(self.path).size  # refuses what are no images
        elif "mu" not in self.names:
            raise DataError(f"{self.path} has neither images ({IMAGES_KEY}) nor statistics (mu, sigma)")
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mean in self.names and covariance not in self.names:
                raise DataError(f"{self.path} has {mean} and no {covariance}")


# ----------------------------------------------------------------------------------------------------------------------
# Files of statistics


def save_statistics(path: Path, statistics: Sequence[ImageStatistics], description: dict) -> None:
    """Writes the statistics of several extractors to one file.

    Args:
        description: of the images: {"data": name, "resolution": pixels, "crop": "center"}.
    """
    tensors, about = {}, {}
    for entry in statistics:
        values = asdict(entry)
        for key in ARRAYS:
            if (value := values.pop(key)) is not None:
                tensors[f"{entry.extractor}.{key}"] = np.ascontiguousarray(value)
        about[entry.extractor] = values
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"description": json.dumps(description), "statistics": json.dumps(about)})


def load_statistics(path: str, extractors: Sequence[FeatureExtractor]) -> tuple[dict, list[ImageStatistics]]:
    """The description of the images, and the statistics of each extractor.

    Raises:
        DataError: if the file is damaged, or holds statistics of other features or weights.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "statistics" not in metadata:
                raise DataError(f"{path} holds no statistics; write them with favae reference-statistics")
            about = json.loads(metadata["statistics"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except DataError:
        raise
    except READ_ERRORS as error:
        raise DataError(f"{path} is damaged ({error}); write it again") from error

    found = []
    for name, weights in ((extractor.name, extractor.hash) for extractor in extractors):
        if name not in about:
            raise DataError(f"{path} holds statistics of the features {', '.join(about)}, not of {name}")
        if about[name]["weights"] != weights:
            raise DataError(f"{path} was made with other weights of {name}; write it again with these")
        own = {key: arrays.get(f"{name}.{key}") for key in ARRAYS}
        found.append(ImageStatistics(**about[name] | own))
    return json.loads(metadata["description"]), found
