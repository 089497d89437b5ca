"""Files of compressed images: a header, and numbers in a range coder. Nothing in a file is ever executed.

A file is 26 bytes and the coded numbers, in little-endian order:

    4  b"fav" and the version of the format
    8  the first bytes of the SHA-256 of the model's weights
    4  height and width of the image in pixels
    2  the largest distance of a symbol from 0
    4  CRC-32 of the scales of all symbols, and of the symbols
    4  CRC-32 of all of the file but these 4 bytes

The first CRC tells a model that computes otherwise than the writer's; the second, a file that is damaged.
"""

import importlib
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from favae.errors import CompressedFileError, ModelError

MAGIC, VERSION = b"fav", 3  # 1: scales not rounded to float32; 2: no checksum of symbols
FIELDS, CHECKSUM = struct.Struct("<3sB8sHHHI"), struct.Struct("<I")
HEADER_SIZE = FIELDS.size + CHECKSUM.size
LARGEST_SIDE = LARGEST_DISTANCE = 2**16 - 1


@dataclass(frozen=True)
class Header:
    """What the reader of a file is told. `symbols_checksum`: see the function of this name."""

    model: bytes
    height: int
    width: int
    largest: int
    symbols_checksum: int


def write(header: Header, payload: bytes) -> bytes:
    """The content of a file."""
    about = FIELDS.pack(
        MAGIC, VERSION, header.model, header.height, header.width, header.largest, header.symbols_checksum
    )
    return about + CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(about))) + payload


def read(data: bytes) -> tuple[Header, bytes]:
    """The header of a file, and the coded numbers.

    Raises:
        CompressedFileError: if it is another kind of file, of another version, or damaged.
    """
    if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
        raise CompressedFileError("no compressed image of favae")
    about, payload = data[: FIELDS.size], data[HEADER_SIZE:]
    _, version, *fields = FIELDS.unpack(about)
    if version != VERSION:
        raise CompressedFileError(f"a file of version {version}; this program reads version {VERSION}")
    (checksum,) = CHECKSUM.unpack_from(data, FIELDS.size)
    if zlib.crc32(payload, zlib.crc32(about)) != checksum:
        raise CompressedFileError("the file is damaged")
    header = Header(*fields)
    if min(header.height, header.width, header.largest) < 1 or len(payload) % 4:
        raise CompressedFileError("the file is damaged")
    # Anybody can write a small file of a huge image. Pillow refuses images of twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and header.height * header.width > 2 * Image.MAX_IMAGE_PIXELS:
        raise CompressedFileError(
            f"its image would have {header.width} x {header.height} pixels, which PIL.Image.MAX_IMAGE_PIXELS forbids"
        )
    return header, payload


def symbols_checksum(indices: np.ndarray, symbols: np.ndarray) -> int:
    """CRC-32 of the indices of scales and of the symbols that have them, of any integer types."""
    return zlib.crc32(symbols.astype("<i4").tobytes(), zlib.crc32(indices.astype("<i2").tobytes()))


class Writer:
    """Collects numbers in a range coder.

    Raises:
        ModelError: if the package constriction is not installed.
    """

    def __init__(self):
        self.library = import_extra("constriction")
        self.coder = self.library.stream.queue.RangeEncoder()

    def channels(self, symbols: np.ndarray, table: np.ndarray) -> None:
        """Adds (C, N) integers from 0 on, whose probabilities are the rows of a table (C, K)."""
        for row, probabilities in zip(symbols.astype(np.int32), table):
            self.coder.encode(row, self.library.stream.model.Categorical(probabilities, perfect=False))

    def gaussians(self, symbols: np.ndarray, scales: np.ndarray, largest: int) -> None:
        """Adds (N,) integers in -largest ... largest, each with a Gaussian of mean 0 and its scale, (N,) float64."""
        family = self.library.stream.model.QuantizedGaussian(-largest, largest)
        self.coder.encode(symbols.astype(np.int32), family, np.zeros_like(scales), scales)

    def payload(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes()


class Reader:
    """Gives the numbers of a `Writer` back, in the order in which they were added.

    Raises:
        ModelError: if the package constriction is not installed.
        AssertionError: of that package, if it finds that the probabilities are not those of the writer.
    """

    def __init__(self, payload: bytes):
        self.library = import_extra("constriction")
        words = np.frombuffer(payload, "<u4").astype(np.uint32)
        self.coder = self.library.stream.queue.RangeDecoder(words)

    def channels(self, count: int, table: np.ndarray) -> np.ndarray:
        """(C, count) integers."""
        models = (self.library.stream.model.Categorical(row, perfect=False) for row in table)
        return np.stack([self.coder.decode(model, count) for model in models])

    def gaussians(self, scales: np.ndarray, largest: int) -> np.ndarray:
        """(N,) integers."""
        family = self.library.stream.model.QuantizedGaussian(-largest, largest)
        return self.coder.decode(family, np.zeros_like(scales), scales)


def import_extra(name: str) -> Any:
    """A package of the extra [compression]. Raises `ModelError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"compression needs the package {error.name}: pip install 'favae[compression]'") from error
