"""Captions: as texts beside images, and in `captions-NNNNN.json` beside each shard of a latent cache.

Such a file is a list with an entry for each image of the shard, in its order: the list of its captions, perhaps empty.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from favae.data.sharded_cache import FILL_THE_GAP, Manifest
from favae.errors import CacheError, DataError


class CaptionSummary(BaseModel):
    """What the manifest of a latent cache says about its captions."""

    count: int
    images_without: int
    hash: str


class CaptionedManifest(Manifest):
    """Of a latent cache, as far as captions need it."""

    tokenizer: str
    captions: CaptionSummary | None = None


def clean_captions(captions: Iterable[str]) -> list[str]:
    """The captions without surrounding white space, and without those that are empty then."""
    return [caption.strip() for caption in captions if caption.strip()]


def read_caption_lines(file: Path) -> list[str]:
    """The captions in a text file, one in a line, in UTF-8 with or without a byte order mark; none if there is no file.

    Raises:
        DataError: if the file is not UTF-8.
    """
    if not file.is_file():
        return []
    try:
        return clean_captions(file.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: captions must be UTF-8 text, one caption per line") from error


def captions_file(folder: Path, number: int) -> Path:
    return folder / f"captions-{number:05}.json"


def read_captions(
    folder: Path, number: int, count: int, checksums: Mapping[str, int | None] = MappingProxyType({})
) -> list[list[str]]:
    """The captions of the `count` images of a shard of a latent cache.

    Args:
        checksums: those of the manifest, once there is one.
    Raises:
        CacheError: if the file is missing, damaged, of another number of images, or not as it was written.
    """
    path = captions_file(folder, number)
    try:
        content = path.read_bytes()
        captions = TypeAdapter(list[list[str]]).validate_json(content)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing; {FILL_THE_GAP}") from None
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise CacheError(f"{path} is damaged ({why}); delete it and {FILL_THE_GAP}") from error
    if len(captions) != count:
        raise CacheError(f"{path} is of {len(captions)} images, its shard of {count}; delete it and {FILL_THE_GAP}")
    if checksums.get(path.name) not in (None, zlib.crc32(content)):
        raise CacheError(f"{path} is not as it was written; delete it and {FILL_THE_GAP}")
    return captions


def check_captions(
    files: Sequence[Path], numbers: Iterable[int], captions_of: Callable[[int], list[list[str]]]
) -> None:
    """Compares captions that are written already with those that the images have now.

    Args:
        files: one for each shard.
        numbers: of those to compare.
        captions_of: the captions of the images of a shard, by its number.
    Raises:
        CacheError: if they differ, or a file is damaged.
    """
    for number in numbers:
        if files[number].exists():
            now = captions_of(number)
            if read_captions(files[number].parent, number, len(now)) != now:
                raise CacheError(
                    f"{files[number]} holds other captions than the images have now; delete {files[number].parent}/"
                    "captions-*.json and write the cache again, which keeps the latents"
                )


def summarize_captions(folder: Path, counts: Sequence[int]) -> dict | None:
    """How many captions a latent cache has, how many images have none, and a hash of all; None if there is no caption.

    Args:
        counts: images of each shard.
    """
    digest, total, without = hashlib.sha256(), 0, 0
    for number, count in enumerate(counts):
        captions = read_captions(folder, number, count)
        digest.update(json.dumps(captions).encode())
        total += sum(map(len, captions))
        without += captions.count([])
    return {"count": total, "images_without": without, "hash": digest.hexdigest()} if total else None


def first_captions(folder: Path, manifest: Mapping[str, Any], limit: int) -> dict[int, str]:
    """The first caption of each of the first `limit` images of a latent cache that have one, by the image's index.

    Args:
        manifest: of the cache.
    Raises:
        CacheError: see `read_captions`.
    """
    found: dict[int, str] = {}
    first = 0
    for number, count in enumerate(manifest["counts"]):
        captions = read_captions(folder, number, count, manifest["checksums"])
        found |= {index: texts[0] for index, texts in enumerate(captions, first) if texts}
        first += count
        if len(found) >= limit:
            break
    return dict(itertools.islice(found.items(), limit))
