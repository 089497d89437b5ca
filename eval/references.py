"""What samples are compared with: real images, or statistics of them.

    python -m favae.eval.references --data imagenet/train --resolution 256 --output imagenet256.safetensors

writes the statistics of a set of images once; `python -m favae.eval.generation --reference` takes the file, a folder
and every other source of images, an .npz of images, or ADM's statistics (mu, sigma, mu_s, sigma_s, arr_0).
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset

from favae.data.images import (
    DataError,
    ImageDataset,
    Source,
    add_data_arguments,
    data_name,
    open_data_arguments,
)
from favae.distributed import process_state
from favae.errors import FavaeError
from favae.eval.features import (
    INCEPTION,
    FeatureExtractor,
    add_feature_arguments,
    extract_features,
    open_extractors,
)
from favae.eval.frechet import feature_statistics
from favae.eval.image_sets import IMAGES_KEY, CroppedImages, NpzImages, npz_names, read_npz

KEPT = 10_000  # real images that precision, recall and KID look at, as ADM's evaluator does
STATISTICS = ("mean", "covariance", "spatial_mean", "spatial_covariance", "kept")


@dataclass
class Reference:
    """A set of real images in the eyes of one extractor.

    Attributes:
        features: the extractor's name.
        hash: of the images' pixels, or of the file of statistics where the images are not at hand.
        count: images behind mean and covariance; None if a file does not say.
        mean, covariance: (D,), (D, D).
        spatial_mean, spatial_covariance: (S,), (S, S), of Inception; else None.
        kept: features (at most 10,000, D), always of the same images; None if there are no images.
    """

    features: str
    hash: str
    count: int | None
    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    kept: np.ndarray | None = None


def _from_features(name: str, arrays: dict[str, np.ndarray], digest: str) -> Reference:
    """
    Args:
        arrays: "features" (N, D) and perhaps "spatial" (N, S), of `extract_features`.
    Raises:
        ValueError: with fewer than two images.
    """
    features = arrays["features"]
    chosen = np.sort(np.random.default_rng(0).permutation(len(features))[:KEPT])
    spatial = feature_statistics(arrays["spatial"]) if "spatial" in arrays else (None, None)
    return Reference(name, digest, len(features), *feature_statistics(features), *spatial, features[chosen])


def open_references(
    path: str,
    extractors: Sequence[FeatureExtractor],
    size: tuple[int, int],
    *,
    open_images: Callable[[], Source] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> list[Reference]:
    """The real images, or statistics, that a path names; one `Reference` for each extractor.

    Args:
        path: a .safetensors of this module, an .npz, or the name of a data source.
        size: height and width of the images it is compared with.
        open_images: opens the data source.
    Raises:
        DataError: if it is of another size or extractor, or damaged.
    """
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    if path.endswith(".safetensors"):
        return [load_reference(path, extractor.name, size) for extractor in extractors]
    if path.endswith(".npz"):
        return _from_npz(path, extractors, size, loading)
    if size[0] != size[1]:
        raise DataError(f"samples of {size[1]} x {size[0]} pixels need a reference .npz of that size; crops are square")
    return references_of(CroppedImages(ImageDataset(open_images(), size[0])), extractors, **loading)


def references_of(
    images: Dataset, extractors: Sequence[FeatureExtractor], *, batch_size: int = 32, num_workers: int = 0
) -> list[Reference]:
    """A set of 8-bit images as a reference, for each extractor; all processes take part."""
    arrays, digest = extract_features(
        images, extractors, batch_size=batch_size, num_workers=num_workers, description="reference"
    )
    return [_from_features(e.name, values, digest) for e, values in zip(extractors, arrays)]


def _from_npz(
    path: str, extractors: Sequence[FeatureExtractor], size: tuple[int, int], loading: dict
) -> list[Reference]:
    """Images, or ADM's statistics: Inception's, of all real images, with 10,000 of these in `arr_0`."""
    names = npz_names(path)
    images = NpzImages(path) if IMAGES_KEY in names else None
    if images is not None and images.size != tuple(size):
        raise DataError(f"{path} holds images of {images.size} pixels, the samples have {size}; take another file")
    if images is None and any(extractor.name != INCEPTION for extractor in extractors):
        raise DataError(f"{path} has no images ({IMAGES_KEY}); it serves --features {INCEPTION} only")
    found = references_of(images, extractors, **loading) if images is not None else [None] * len(extractors)
    if "mu" in names or images is None:
        for i, extractor in enumerate(extractors):
            if extractor.name == INCEPTION:
                keys = ("mu", "sigma", "mu_s", "sigma_s") if "mu_s" in names else ("mu", "sigma")
                statistics = [np.asarray(read_npz(path, key)) for key in keys]
                kept = found[i] and found[i].kept
                found[i] = Reference(
                    INCEPTION, _file_hash(path), None, *statistics[:2], *(statistics[2:] or (None, None)), kept
                )
    return found


def _file_hash(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Files of statistics


def save_references(path: Path, references: Sequence[Reference], description: dict) -> None:
    """One file for several extractors; `description` says of what (data, resolution, crop)."""
    tensors, about = {}, {}
    for reference in references:
        values = asdict(reference)
        for key in STATISTICS:
            if (value := values.pop(key)) is not None:
                tensors[f"{reference.features}.{key}"] = np.ascontiguousarray(value)
        about[reference.features] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    save_file(tensors, temporary, {"description": json.dumps(description), "references": json.dumps(about)})
    temporary.rename(path)


def load_reference(path: str, features: str, size: tuple[int, int]) -> Reference:
    """
    Raises:
        DataError: if the file is damaged, or holds statistics of other features or another size.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "references" not in metadata:
                raise DataError(f"{path} holds no statistics; write them with python -m favae.eval.references")
            about, description = json.loads(metadata["references"]), json.loads(metadata["description"])
            if features not in about:
                raise DataError(f"{path} holds statistics of {', '.join(about)}, not of {features} (--features)")
            if (description["resolution"],) * 2 != tuple(size):
                found = description["resolution"]
                raise DataError(f"{path} is of {found} px images, the samples have {size[1]} x {size[0]} pixels")
            names = [key for key in STATISTICS if f"{features}.{key}" in file.keys()]  # noqa: SIM118
            return Reference(**about[features], **{key: file.get_tensor(f"{features}.{key}") for key in names})
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
        images = CroppedImages(ImageDataset(open_data_arguments(arguments), arguments.resolution))
        loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
        references = references_of(images, open_extractors(arguments), **loading)
        if process_state().is_main_process:
            description = {"data": data_name(arguments), "resolution": arguments.resolution, "crop": "center"}
            save_references(arguments.output, references, description)
            for reference in references:
                print(f"{reference.features}: {reference.count:,} images, pixels {reference.hash[:12]}")
    except (FavaeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
