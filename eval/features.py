"""Feature extractors for evaluation, their names in results, and rows that several processes computed."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor

from favae.distributed import process_state
from favae.foundation import OFFLINE_BACKBONE, FoundationModel, MissingWeights

INCEPTION = "inception"
INCEPTION_HASH = "6726825d"  # of torch-fidelity's weights-inception-2015-12-05-6726825d.pth

REMEDY = f"--weights FILE takes a local file, --features {OFFLINE_BACKBONE} needs no network"


class FeatureExtractor:
    """uint8 images (B, 3, H, W) -> features (B, D) and class logits (B, K) or None, float32.

    Args:
        name: "inception" (the network of FID, in torch-fidelity's port), "efficientnet-lite0" (no network needed),
            or any timm model.
        weights: a local file; None downloads.

    Raises:
        MissingWeights: if they cannot be loaded, or the file is not the published one.
    """

    def __init__(self, name: str, weights: str | None = None):
        self.name = name
        if name == INCEPTION:
            self.model, self._extract = _inception(weights)
        else:
            self.model = FoundationModel(name, weights, REMEDY)
            self._extract = lambda images: self.model.pooled(images.float() / 127.5 - 1)
        self.model.to(process_state().device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.dtype != torch.uint8:
            raise TypeError(f"expected uint8 images, got {images.dtype}")
        features, logits = self._extract(images.to(process_state().device))
        return features.float(), None if logits is None else logits.float()

    def metric(self, name: str) -> str:
        return metric_name(name, self.name)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that computes features of images."""
    parser.add_argument("--features", default=INCEPTION, help=f"{INCEPTION}, {OFFLINE_BACKBONE}, or a timm model")
    parser.add_argument("--weights", help="local weights for --features")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-workers", type=int, default=0)


def metric_name(name: str, features: str) -> str:
    """How a number on some features may be called: FID and IS are names of Inception's numbers alone."""
    return name if features == INCEPTION else f"{name.replace('FID', 'FD')}({features})"


def _inception(weights: str | None) -> tuple[torch.nn.Module, Callable]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        if not Path(weights).is_file():
            raise MissingWeights(f"--weights: no such file: {weights}")
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        # Checked before torch-fidelity unpickles it.
        if not digest.startswith(INCEPTION_HASH):
            raise MissingWeights(f"{weights}: SHA-256 begins with {digest[:8]}, FID's Inception is {INCEPTION_HASH}")
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    except (OSError, RuntimeError) as error:
        raise MissingWeights(
            f"the Inception weights (weights-inception-2015-12-05-{INCEPTION_HASH}.pth, torch-fidelity) could not be "
            f"downloaded ({type(error).__name__}); {REMEDY}"
        ) from error
    return model, model


def own_indices(total: int) -> range:
    """The items of this process: every n-th one, from its rank on.

    Raises:
        ValueError: if some process would get none.
    """
    state = process_state()
    if total < state.num_processes:
        raise ValueError(f"{total} images are too few for {state.num_processes} processes")
    return range(state.process_index, total, state.num_processes)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of image `index`, whatever process and batch it is made in."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))


def gather_rows(rows: Tensor, indices: Tensor | range, total: int) -> Tensor:
    """Puts rows that the processes computed in the order of the whole, on every process, on the CPU.

    Args:
        rows: (n, ...), this process's.
        indices: (n,), the place of each in the whole; no two processes have the same.
        total: how many places there are; those that no process filled (unreadable images) are left out.
    Returns:
        (at most total, ...).
    """
    device = process_state().device
    indices = torch.as_tensor(list(indices) if isinstance(indices, range) else indices, device=device)
    everything = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype, device=device)
    everything[indices] = rows.to(device)
    filled = torch.zeros(total, device=device)
    filled[indices] = 1
    everything, filled = reduce(everything, "sum"), reduce(filled, "sum")
    return everything[filled > 0].cpu()
