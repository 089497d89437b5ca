"""Whether a cache is as it was written, by all of its bytes: `favae verify`."""

from pathlib import Path

from favae.data.image_record import check_images
from favae.data.images import Source
from favae.data.latents import open_latents
from favae.data.sharded_cache import FILL_THE_GAP, MANIFEST_FILE, find_damage, read_manifest
from favae.data.text_embeddings import FOLDER, TextEmbeddings
from favae.errors import CacheError


def verify_cache(folder: Path, source: Source | None = None) -> str:
    """Reads a finished cache of latents, with the text embeddings inside it, or a folder of text embeddings alone.

    Args:
        source: the images that the latents were made of; the bytes of each are compared, too.
    Returns:
        What was found to be right, in words.
    Raises:
        CacheError: if anything is missing or damaged, or of other images or captions. It names all damaged files.
    """
    manifest = read_manifest(folder, "cache")
    if "encoder" in manifest:
        if source is not None:
            raise CacheError(f"{folder} holds text embeddings, which images cannot be compared with")
        _find_damage(folder)
        images, inside = len(TextEmbeddings(folder)), ""
    else:
        texts = [folder / FOLDER] if (folder / FOLDER / MANIFEST_FILE).exists() else []
        _find_damage(folder, *texts)
        latents = open_latents(folder, text_embeddings=TextEmbeddings(*texts) if texts else None)
        if source is not None:
            check_images(folder, latents.files, manifest.get("images"), source, read_all=True)
        images, inside = len(latents), ", with text embeddings" if texts else ""
    return f"{folder} is as it was written: {images:,} images{inside}"


def _find_damage(*folders: Path) -> None:
    damage = [words for folder in folders for words in find_damage(folder, "cache")]
    if damage:
        raise CacheError(f"{'; '.join(damage)}. Delete what is damaged and {FILL_THE_GAP}")
