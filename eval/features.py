"""Feature extractors for evaluation, and what their metrics may be called."""

from pathlib import Path

import torch
from torch import Tensor

from favae.channels import in_color
from favae.data.images import to_uint8
from favae.distributed import process_state
from favae.errors import MissingWeights
from favae.foundation import FoundationModel
from favae.hashing import hash_file, hash_model

INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's; the digits begin its SHA-256
INCEPTION_HASH = "6726825d"
SPATIAL_CHANNELS = 7  # of Inception's mixed_6/conv, for sFID
DINOV2 = "dinov2"
DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"  # timm's; its position embeddings differ a little: docs/evaluation.md
CLIP = "clip"  # for CMMD
CLIP_MODEL = "vit_large_patch14_clip_quickgelu_336.openai"
CLIP_SIZE = 336
FEATURE_SIZE = 224  # of the images that other networks than Inception and CLIP see


class FeatureExtractor:
    """uint8 images (B, C, H, W) -> {"features": (B, D)} and, where there are any, "logits" (B, K) and "spatial" (B, S).

    Images are seen `in_color`; what comes out is float32. "spatial" are the first 7 channels of Inception's
    mixed_6/conv, position by position (17 x 17 x 7 = 2,023), as in ADM's sFID.

    Args:
        name: "inception" (the network of FID, in torch-fidelity's port), "dinov2" (ViT-L/14), "clip" (the image
            embeddings of CLIP ViT-L/14 at 336 px), "efficientnet-lite0" (needs no network), or any timm
            model that takes images of 224 px.
        weights: a local file; None downloads them.

    Attributes:
        hash: SHA-256 of the weights.

    Raises:
        MissingWeights: if they cannot be loaded, or the file is not the published one.
    """

    def __init__(self, name: str, weights: str | None = None):
        self.name = name
        if name == INCEPTION:
            self.model = _inception(weights)
        elif name == CLIP:
            self.model = FoundationModel(CLIP_MODEL, weights, keep_head=True, size=CLIP_SIZE)
        else:
            self.model = FoundationModel(DINOV2_MODEL if name == DINOV2 else name, weights, size=FEATURE_SIZE)
        self.model.to(process_state().device)
        self.hash = hash_model(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8:
            raise TypeError(f"expected uint8 images, got {images.dtype}")
        images = images.to(process_state().device)
        if images.shape[1] != 3:
            images = to_uint8(in_color(images.float() / 127.5 - 1))
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            if self.name == INCEPTION:
                return self._inception_features(images)
            if self.name == CLIP:
                return {"features": self.model.pooled(images.float() / 127.5 - 1, CLIP_SIZE)[1]}
            features, logits = self.model.pooled(images.float() / 127.5 - 1, FEATURE_SIZE)
        return {"features": features} if logits is None else {"features": features, "logits": logits}

    def _inception_features(self, images: Tensor) -> dict[str, Tensor]:
        hidden: list[Tensor] = []
        hook = self.model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        features, logits = self.model(images)
        hook.remove()
        spatial = hidden[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order of axes
        return {"features": features.float(), "logits": logits.float(), "spatial": spatial.float()}

    def metric(self, name: str) -> str:
        """What a metric of these features may be called; see `metric_name`."""
        return metric_name(name, self.name)


def metric_name(name: str, extractor: str) -> str:
    """What a metric may be called on an extractor's features: FID, KID and IS are names of Inception's alone."""
    if extractor == INCEPTION:
        return name
    name = name.replace("FID", "FD").replace("KID", "KD")
    return f"{name}-DINOv2" if extractor == DINOV2 else f"{name}({extractor})"


def _inception(weights: str | None) -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE) if weights is None else Path(weights)
    if weights is None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file))
        except OSError as error:
            raise MissingWeights(
                f"the weights of Inception ({INCEPTION_FILE}, torch-fidelity) could not be downloaded "
                f"({type(error).__name__})"
            ) from error
    if not file.is_file():
        raise MissingWeights(f"weights of Inception: no such file: {file}")
    # Checked before torch-fidelity unpickles the file.
    digest = hash_file(file)
    if not digest.startswith(INCEPTION_HASH):
        raise MissingWeights(
            f"the SHA-256 of {file} begins with {digest[:8]}, that of FID's Inception with {INCEPTION_HASH}"
        )
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
