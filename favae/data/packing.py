"""Latents in 6 bits: the 64 values between the least and the greatest of a channel of an image, four in three bytes."""

import torch
from torch import Tensor
from torch.nn import functional as F

GREATEST = 63  # of a code


def pack(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each channel of each image to 64 values, evenly spaced from its least to its greatest.

    Args:
        latents: (..., h, w).
    Returns:
        codes (..., h, 3 ceil(w / 4)), uint8: of four neighbors in a row, each byte has the 6 bits of one of the first
        three and 2 bits of the last, the lowest first; offset and step (..., 1, 1), float16. A latent is about
        offset + code * step, within half a step and what float16 loses of the offset.
    """
    latents = latents.float()
    offset = latents.amin((-2, -1), keepdim=True).half()
    span = latents.amax((-2, -1), keepdim=True) - offset.float()
    step = (span / GREATEST).half()
    codes = (latents - offset.float()) / step.float().masked_fill(step == 0, 1.0)
    codes = F.pad(codes.round().clamp(0, GREATEST).to(torch.uint8), (0, -latents.shape[-1] % 4)).unflatten(-1, (-1, 4))
    last = torch.stack([codes[..., 3] >> 2 * place & 3 for place in range(3)], dim=-1)
    return (codes[..., :3] | last << 6).flatten(-2), offset, step


def unpack(codes: Tensor, offset: Tensor, step: Tensor, width: int) -> Tensor:
    """The latents (..., h, width) of what `pack` returns, float32."""
    codes = codes.unflatten(-1, (-1, 3))
    first, second, third = (codes >> 6).unbind(-1)  # two bits of the last, each
    last = (first | second << 2 | third << 4).unsqueeze(-1)
    values = torch.cat([codes & GREATEST, last], dim=-1).flatten(-2)[..., :width]
    return offset.float() + values * step.float()
