"""Sets of 8-bit images to be measured: crops of a data source, folders of samples, .npz files.

Items are {"image": uint8 (C, H, W), "index": int}, all of one size, or None for a file that cannot be decoded.
"""

import contextlib
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch.utils.data import Dataset

from favae.data.decoding import UnusableImage, upright_size
from favae.data.folders import FolderSource
from favae.data.images import ImageDataset, to_uint8
from favae.errors import DataError
from favae.eval.results import UINT8
from favae.files import SETTINGS_FILE, atomic_path

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)  # in all processes: each skips other images

IMAGES_KEY = "arr_0"  # in ADM's files


class CroppedImages(Dataset):
    """Center crops of a data source."""

    def __init__(self, images: ImageDataset):
        self.images = images
        self.size = (images.resolution, images.resolution)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict | None:
        item = self.images[index]
        return None if item is None else {"image": to_uint8(item["image"]), "index": index}


class SampleFolder(Dataset):
    """The image files below a folder, in the order of their paths. Nothing is cropped or resized.

    Raises:
        DataError: if there is none, they differ in size, or in how many folders they are in, or were sampled as several
            sets.
    """

    def __init__(self, path: str | Path):
        sets = sorted(file.parent for file in Path(path).rglob(SETTINGS_FILE))
        if len(sets) > 1:
            raise DataError(f"{path} holds several sets of samples, such as {sets[0]} and {sets[1]}; name one of them")
        self.source = FolderSource(path, min_size=1, labels=False)
        by_depth = {len(file.parts): file for file in self.source.files}
        if len(by_depth) > 1:
            first, second, *_ = by_depth.values()
            raise DataError(f"{path} has samples at several depths, such as {first} and {second}; name one folder")
        # Only what is no square has another size when it is turned upright.
        sizes = (
            upright_size(file) if width != height else (width, height)
            for file, (width, height) in zip(self.source.files, self.source.sizes)
        )
        first, *others = [(height, width) for width, height in sizes]
        self.size = first
        for i, (height, width) in enumerate(others, start=1):
            if (height, width) != first:
                raise DataError(
                    f"{self.source.name(i)} has {width} x {height} pixels where {self.source.name(0)} has "
                    f"{first[1]} x {first[0]}; all samples must have one size"
                )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict | None:
        try:
            image = self.source.read(index)
        except UnusableImage as error:
            logger.warning("skipped %s: %s", self.source.name(index), error)
            return None
        return {"image": torch.from_numpy(np.array(image)).permute(2, 0, 1), "index": index}


class NpzImages(Dataset):
    """The images of an .npz file: `arr_0`, uint8 (N, H, W, 3), as ADM's evaluator reads them.

    An uncompressed file is mapped into memory, not read: 50,000 images of 256 px take 9.8 GB.

    Raises:
        DataError: if the file is damaged, or holds no such array.
    """

    def __init__(self, path: str | Path):
        self.array = read_npz(path, IMAGES_KEY)
        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or shape[-1] != 3 or not len(self.array):
            raise DataError(f"{path}: {IMAGES_KEY} has shape {shape}; it must be (N, H, W, 3)")
        if dtype != np.uint8:
            raise DataError(f"{path}: {IMAGES_KEY} is {dtype}; it must be uint8, {UINT8} for x in [-1, 1]")
        self.size = tuple(shape[1:3])

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.from_numpy(self.array[index].copy()).permute(2, 0, 1), "index": index}


def open_samples(path: str | Path) -> Dataset:
    """Opens a folder or an .npz file of images.

    Raises:
        DataError: if it is neither.
    """
    return NpzImages(path) if str(path).endswith(".npz") else SampleFolder(path)


# ----------------------------------------------------------------------------------------------------------------------
# .npz files


def npz_names(path: str | Path) -> list[str]:
    """The names of the arrays in an .npz file. Raises `DataError` if it is missing or damaged."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: str | Path, key: str) -> np.ndarray:
    """One array of an .npz file, mapped into memory if the file is not compressed.

    Raises:
        DataError: if the file is missing, damaged, or has no such array.
    """
    names = npz_names(path)
    if key not in names:
        raise DataError(f"{path}: no array '{key}', only {', '.join(names) or 'none'}")
    with _readable(path), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(path)[key]
        # An uncompressed member is an .npy file inside the archive, and begins where numpy's signature stands.
        with open(path, "rb") as file:
            file.seek(member.header_offset)
            file.seek(member.header_offset + file.read(4096).index(npy.MAGIC_PREFIX))
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran_order, dtype = read_header(file)
            order = "F" if fortran_order else "C"
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)


@contextlib.contextmanager
def _readable(path: str | Path):
    """Turns what numpy and zipfile raise for damaged files into a `DataError`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is damaged or not an .npz file ({error}); write or download it again") from error


def write_npz(path: Path, images: Dataset) -> None:
    """Writes all images as `arr_0`, in random order.

    ADM's evaluator computes the Inception score over consecutive parts, so the order of classes would change it.

    Raises:
        DataError: if an image cannot be read.
    """
    order = np.random.default_rng(0).permutation(len(images))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *images.size, 3)}
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, header)
        for index in order:
            item = images[int(index)]
            if item is None:
                raise DataError(f"{path}: image {index} cannot be read, so the file was not written")
            file.write(item["image"].permute(1, 2, 0).contiguous().numpy().tobytes())
