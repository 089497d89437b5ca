"""States of the captions of a latent cache: what a text encoder makes of them, written once, read memory-mapped.

    python -m favae.data.text --latents latents/ --encoder openai/clip-vit-large-patch14
    torchrun --nproc_per_node 8 -m favae.data.text ...         (any number of processes writes the same files)

A folder, latents/text, of a `shard-NNNNN.safetensors` for each of the cache, with, for its n images and m captions,
    states (m, L, D), lengths (m,)    one state per token, padded to the longest caption of the shard
    offsets (n + 1,)                  the captions of image k are the rows offsets[k] ... offsets[k + 1] - 1, or none
and a `manifest.json`, written last: encoder, the hash of its weights, length, dtype and counts. A killed command goes
on with the shards that are missing when it is run again.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from favae.data.shards import MANIFEST, check_plan, locate, open_shard, read_captions, read_manifest, shard_file
from favae.distributed import process_state
from favae.errors import CacheError, FavaeError, hint
from favae.files import atomic_path, write_text

logger = logging.getLogger(__name__)

FOLDER = "text"
NAMES = ("states", "lengths", "offsets")


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_states(
    encoder: nn.Module,
    latents: str | Path,
    output: str | Path | None = None,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
) -> dict:
    """Encodes every caption of a latent cache; called by every process there is.

    Args:
        encoder: a `favae.text_encoder.TextEncoder`.
        latents: a finished latent cache with captions.
        output: a new folder, or one that the same call was writing; None takes `text` in that of the cache.
        dtype: of the stored states.
    Returns:
        The manifest.
    Raises:
        CacheError: if the cache has no captions, if the folder holds states of another encoder or of other captions,
            or if states do not fit into the dtype.
    """
    state = process_state()
    latents = Path(latents)
    output = latents / FOLDER if output is None else Path(output)
    cache = read_manifest(latents, "latent cache", "python -m favae.data.latents")
    if not cache.get("captions"):
        raise CacheError(
            f"{latents} has no captions; put them where docs/datasets.md says and run favae.data.latents again "
            "with the same options, which adds them without encoding again"
        )
    plan = {
        "encoder": encoder.name,
        "hash": encoder.hash,
        "dim": encoder.dim,
        "max_length": encoder.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "captions": cache["captions"]["hash"],
    }
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        check_plan(output, plan, "folder of text states")
    state.wait_for_everyone()
    check_plan(output, plan, "folder of text states")

    encoder = encoder.to(state.device)
    missing = [k for k in range(len(cache["counts"])) if not shard_file(output, k).exists()]
    mine = [k for k in missing if k % state.num_processes == state.process_index]
    for k in tqdm(mine, desc="captions", unit="shard", disable=not state.is_main_process):
        tensors = _encode(encoder, read_captions(latents, k, cache["counts"][k]), batch_size, dtype)
        with atomic_path(shard_file(output, k)) as temporary:
            save_file(tensors, temporary)
    state.wait_for_everyone()

    if state.is_main_process:
        write_text(output / MANIFEST, json.dumps({**plan, **_summary(output, len(cache["counts"]))}, indent=1))
    state.wait_for_everyone()
    return json.loads((output / MANIFEST).read_text())


def _encode(encoder: nn.Module, captions: list[list[str]], batch_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    texts = [text for several in captions for text in several]
    different = sorted(set(texts), key=lambda text: (len(text), text))  # each once; batches of about one length
    rows = []
    for first in range(0, len(different), batch_size):
        states, mask = encoder.encode(different[first : first + batch_size])
        states, lengths = states.to("cpu", dtype), mask.sum(1).tolist()
        if not torch.isfinite(states).all():
            raise CacheError(f"states of '{encoder.name}' do not fit into {dtype}; give --dtype float32")
        rows += [row[:length].clone() for row, length in zip(states, lengths)]  # a view would keep the padding
    place = {text: row for text, row in zip(different, rows)}
    lengths = [len(place[text]) for text in texts]
    states = torch.zeros(len(texts), max(lengths, default=1), encoder.dim, dtype=dtype)
    for row, text in zip(states, texts):
        row[: len(place[text])] = place[text]
    offsets = np.cumsum([0, *map(len, captions)])
    return {"states": states, "lengths": torch.tensor(lengths, dtype=torch.int64), "offsets": torch.from_numpy(offsets)}


def _summary(output: Path, num_shards: int) -> dict:
    """Images per shard, and how many captions and images without any there are in all."""
    counts, total, without = [], 0, 0
    for k in range(num_shards):
        offsets = _read_shard(shard_file(output, k))["offsets"]
        counts.append(len(offsets) - 1)
        total += int(offsets[-1])
        without += int((offsets.diff() == 0).sum())
    return {"counts": counts, "count": total, "images_without": without}


def _read_shard(path: Path) -> dict[str, Tensor]:
    with open_shard(path) as shard:  # memory-mapped, not loaded
        if sorted(shard.keys()) != sorted(NAMES):
            raise CacheError(f"{path} is no shard of text states; delete it and run the same command again")
        return {name: shard.get_tensor(name) for name in NAMES}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class CaptionStates:
    """The states of captions, read in batches, one caption of each image.

    Args:
        folder: that `write_states` wrote.

    Attributes:
        encoder: its name, for `favae.text_encoder.TextEncoder`. hash: of its weights.
        dim: channels D. max_length: tokens.

    Raises:
        CacheError: for a folder without manifest, a missing or a truncated shard.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, "folder of text states", "python -m favae.data.text")
        for name in ("encoder", "hash", "dim", "max_length"):
            setattr(self, name, self.manifest[name])
        self._open: dict[int, dict[str, Tensor]] = {}
        for number, count in enumerate(self.manifest["counts"]):
            path = shard_file(self.folder, number)
            if not path.is_file():
                raise CacheError(f"{path} is missing; run the same command again, it fills the gap")
            found = len(_read_shard(path)["offsets"]) - 1
            if found != count:
                raise CacheError(f"{path} is of {found} images where the manifest says {count}; delete {self.folder}")

    def __len__(self) -> int:
        """Images, with and without captions."""
        return sum(self.manifest["counts"])

    def check(self, manifest: dict, latents: str | Path) -> None:
        """Raises `CacheError` unless these are the states of the captions of the latents with this manifest."""
        captions = manifest.get("captions") or {}
        if self.manifest["counts"] != manifest["counts"] or self.manifest["captions"] != captions.get("hash"):
            raise CacheError(
                f"{self.folder} was made of other captions than those of {latents}; delete it and run "
                f"python -m favae.data.text --latents {latents} --encoder {self.encoder}"
            )

    def read(self, indices: np.ndarray, choices: np.ndarray) -> tuple[Tensor, Tensor]:
        """
        Args:
            indices: (B,), of images.
            choices: (B,), numbers from 0 on; modulo the number of captions of an image, they choose one.
        Returns:
            states (B, L, D) float32 and mask (B, L) bool, for the longest caption of the batch, L >= 1. The mask of
            an image without captions is False everywhere. On the CPU.
        Raises:
            IndexError: for an index that is not there.
        """
        numbers, rows = locate(indices, self.manifest["counts"])
        found = [self._states(*place) for place in zip(numbers.tolist(), rows.tolist(), np.asarray(choices).tolist())]
        states = torch.zeros(len(found), max([1, *map(len, found)]), self.dim)
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for k, one in enumerate(found):
            states[k, : len(one)] = one
            mask[k, : len(one)] = True
        return states, mask

    def _states(self, number: int, row: int, choice: int) -> Tensor:
        """(length, D); of length 0 for an image without captions."""
        if number not in self._open:  # once in each worker that reads it
            self._open[number] = _read_shard(shard_file(self.folder, number))
        shard = self._open[number]
        first, last = shard["offsets"][row : row + 2].tolist()
        if first == last:
            return torch.zeros(0, self.dim)
        caption = first + choice % (last - first)
        return shard["states"][caption, : int(shard["lengths"][caption])]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # memory maps do not travel to workers


def main(argv: list[str] | None = None) -> None:
    from favae.text_encoder import TextEncoder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", required=True, help="a finished latent cache with captions")
    parser.add_argument("--encoder", required=True, help="minilm, or a folder or hub name that transformers opens")
    parser.add_argument("--output", help="a folder (default: text in that of the latents)")
    parser.add_argument(
        "--max-length", type=int, help="tokens of the longest caption (default: what the encoder takes)"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        with hint("--encoder FOLDER takes a local copy, --encoder minilm needs no network"):
            encoder = TextEncoder(arguments.encoder, arguments.max_length)
        manifest = write_states(
            encoder,
            arguments.latents,
            arguments.output,
            batch_size=arguments.batch_size,
            dtype=getattr(torch, arguments.dtype),
        )
    except (FavaeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if process_state().is_main_process:
        folder = arguments.output or Path(arguments.latents) / FOLDER
        print(
            f"{manifest['count']:,} captions of {sum(manifest['counts']):,} images in {folder}, "
            f"{manifest['images_without']:,} images without, by {process_state().num_processes} process(es)"
        )


if __name__ == "__main__":
    main()
