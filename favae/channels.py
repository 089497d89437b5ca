"""What the channels of an image mean: one is gray, three are red, green and blue, the fourth is the opacity."""

import torch
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by the number of channels


def in_color(images: Tensor) -> Tensor:
    """What an image looks like over white, in the three channels that networks trained on photographs take.

    Args:
        images: (..., C, H, W) with C of `MODES`, around [-1, 1]; opacities beyond it are clamped.
    Returns:
        (..., 3, H, W), differentiable: gray is repeated, and colors are as they are.
    """
    channels = images.shape[-3]
    if channels == 1:
        return torch.cat([images] * 3, dim=-3)
    if channels == 3:
        return images
    color, opacity = images[..., :3, :, :], (images[..., 3:, :, :].clamp(-1, 1) + 1) / 2
    return opacity * color + 1 - opacity
