"""What samples are compared with: real images, or statistics of them.

    python -m favae.eval.references --data imagenet/train --resolution 256 --output imagenet256.safetensors

writes the statistics of a set of images once; `python -m favae.eval.generation --reference` takes the file, a folder
and every other source of images, an .npz of images, or ADM's statistics (mu, sigma, mu_s, sigma_s, arr_0).
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from favae.data.images import ImageDataset, Source
from favae.data.sources import add_data_arguments, data_name, open_data_arguments
from favae.distributed import process_state
from favae.errors import DataError, FavaeError
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import INCEPTION, FeatureExtractor, add_feature_arguments, open_extractors
from favae.eval.image_sets import IMAGES_KEY, CroppedImages, NpzImages, npz_names, read_npz
from favae.files import atomic_path
from favae.hashing import hash_file

KEPT = 10_000  # real images that precision, recall and KID look at, as ADM's evaluator does
ARRAYS = ("mean", "covariance", "spatial_mean", "spatial_covariance", "kept", "logits")


class Reference:
    """The real images, or statistics, that a path names. What can be checked is checked at once, before samples of
    hours are drawn for it.

    Args:
        path: a .safetensors of this module, an .npz, or the name of a data source.
        extractors: in whose eyes.
        open_images: opens the data source.
    Raises:
        DataError: if it is missing or damaged, or of other features.
    """

    def __init__(self, path: str, extractors: Sequence[FeatureExtractor], open_images: Callable[[], Source] | None):
        self.path, self.extractors = path, extractors
        self.loaded = self.names = self.source = None
        if path.endswith(".safetensors"):
            self.loaded = load_statistics(path, extractors)
        elif path.endswith(".npz"):
            self.names = npz_names(path)
            if IMAGES_KEY not in self.names and any(extractor.name != INCEPTION for extractor in extractors):
                raise DataError(f"{path} has no images ({IMAGES_KEY}); it serves --features {INCEPTION} only")
        elif open_images is None:
            raise DataError(f"{path}: not a .safetensors of favae.eval.references, and not an .npz")
        else:
            self.source = open_images()

    def statistics(self, size: tuple[int, int], *, batch_size: int = 32, num_workers: int = 0) -> list[ImageStatistics]:
        """For each extractor; all processes take part.

        Args:
            size: height and width of the images that are compared with it.
        Raises:
            DataError: if it is of another size.
        """
        loading = {"keep": KEPT, "description": "reference", "batch_size": batch_size, "num_workers": num_workers}
        samples = f"the samples have {size[1]} x {size[0]} pixels"
        if self.loaded is not None:
            found, statistics = self.loaded
            if (found["resolution"],) * 2 != tuple(size):
                raise DataError(f"{self.path} is of {found['resolution']} px images, {samples}")
            return statistics
        if self.names is not None:
            return self._from_npz(tuple(size), samples, loading)
        if size[0] != size[1]:
            raise DataError(f"{samples}, which needs a reference .npz of that size; crops are square")
        return image_statistics(CroppedImages(ImageDataset(self.source, size[0])), self.extractors, **loading)

    def _from_npz(self, size: tuple[int, int], samples: str, loading: dict) -> list[ImageStatistics]:
        """Images, or ADM's statistics: Inception's, of all real images, with 10,000 of these in `arr_0`."""
        found: list[ImageStatistics | None] = [None] * len(self.extractors)
        if IMAGES_KEY in self.names:
            images = NpzImages(self.path)
            if images.size != size:
                raise DataError(f"{self.path} holds images of {images.size[1]} x {images.size[0]} pixels, {samples}")
            found = image_statistics(images, self.extractors, **loading)
        for i, extractor in enumerate(self.extractors):
            if extractor.name == INCEPTION and ("mu" in self.names or found[i] is None):
                keys = ("mu", "sigma", "mu_s", "sigma_s") if "mu_s" in self.names else ("mu", "sigma")
                arrays = [np.asarray(read_npz(self.path, key)) for key in keys]
                kept = found[i] and found[i].kept
                spatial = arrays[2:] or (None, None)
                found[i] = ImageStatistics(INCEPTION, hash_file(self.path), None, *arrays[:2], *spatial, kept=kept)
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Files of statistics


def save_statistics(path: Path, statistics: Sequence[ImageStatistics], description: dict) -> None:
    """One file for several extractors; `description` says of what (data, resolution, crop)."""
    tensors, about = {}, {}
    for entry in statistics:
        values = asdict(entry)
        for key in ARRAYS:
            if (value := values.pop(key)) is not None:
                tensors[f"{entry.features}.{key}"] = np.ascontiguousarray(value)
        about[entry.features] = values
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"description": json.dumps(description), "statistics": json.dumps(about)})


def load_statistics(path: str, extractors: Sequence[FeatureExtractor]) -> tuple[dict, list[ImageStatistics]]:
    """The description and the statistics of each extractor.

    Raises:
        DataError: if the file is damaged, or holds statistics of other features or weights.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "statistics" not in metadata:
                raise DataError(f"{path} holds no statistics; write them with python -m favae.eval.references")
            about, description = json.loads(metadata["statistics"]), json.loads(metadata["description"])
            found = []
            for extractor in extractors:
                name = extractor.name
                if name not in about:
                    raise DataError(f"{path} holds statistics of {', '.join(about)}, not of {name} (--features)")
                if about[name]["weights"] != extractor.hash:
                    raise DataError(f"{path} was made with other weights of {name}; write it again with these")
                keys = [key for key in ARRAYS if f"{name}.{key}" in file.keys()]  # noqa: SIM118
                arrays = {key: file.get_tensor(f"{name}.{key}") for key in keys}
                found.append(ImageStatistics(**dict.fromkeys(ARRAYS) | about[name] | arrays))
            return description, found
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); write it again") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, "--data", split="train")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    add_feature_arguments(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        if arguments.output.suffix != ".safetensors":
            raise DataError(f"--output must end in .safetensors, got {arguments.output}")
        source = open_data_arguments(arguments)
        reference = Reference(arguments.data, open_extractors(arguments), lambda: source)
        size = (arguments.resolution, arguments.resolution)
        found = reference.statistics(size, batch_size=arguments.batch_size, num_workers=arguments.num_workers)
        if process_state().is_main_process:
            description = {"data": data_name(arguments), "resolution": arguments.resolution, "crop": "center"}
            save_statistics(arguments.output, found, description)
            for entry in found:
                print(f"{entry.features}: {entry.count:,} images, pixels {entry.hash[:12]}")
    except (FavaeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
