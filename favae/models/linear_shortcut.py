"""A linear path around an autoencoder: patches to latents and back, over the lowest frequencies."""

import math

import torch
from torch import Tensor, nn

# An orthonormal basis of colours: brightness, red against blue, green against both.
OPPONENT_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))
CHROMA_ENERGY = (0.05, 0.01)  # of brightness at the same frequency; measured on the photographs of scikit-image
LOGVAR_AT_START = -10.0  # of the posterior: noise of 0.007, against latents of about 1


def frequency_basis(size: int, count: int, channels: int = 3) -> Tensor:
    """The `count` strongest of the DCT's basis patches, by the power that photographs have on average.

    Power is taken as 1 / (u^2 + v^2) at the frequency (u, v), half cycles per patch, and as a small share of that for
    the two chromatic directions (for 3 channels; others have no preferred one). Means come first.

    Args:
        size: side of the patch.
    Returns:
        (count, channels, size, size), orthonormal, strongest first.
    Raises:
        ValueError: if a patch has fewer than `count` numbers.
    """
    if count > channels * size**2:
        raise ValueError(f"a patch of {channels} x {size} x {size} has fewer than {count} basis patches")
    positions = torch.arange(size, dtype=torch.float64) + 0.5
    cosines = torch.cos(math.pi / size * positions * torch.arange(size)[:, None])
    cosines = cosines / cosines.norm(dim=1, keepdim=True)  # (frequency, position)
    colours = torch.tensor(OPPONENT_COLOURS, dtype=torch.float64) if channels == 3 else torch.eye(channels).double()
    colours = colours / colours.norm(dim=1, keepdim=True)
    energy = [1.0, *CHROMA_ENERGY] if channels == 3 else [1.0] * channels
    power = {
        (c, u, v): energy[c] / (u**2 + v**2) if u or v else math.inf
        for c in range(channels)
        for u in range(size)
        for v in range(size)
    }
    chosen = sorted(power, key=lambda key: (-power[key], key))[:count]
    patches = [colours[c][:, None, None] * torch.outer(cosines[u], cosines[v]) for c, u, v in chosen]
    return torch.stack(patches).float()


class PatchesToLatents(nn.Conv2d):
    """(B, 3, H, W) -> (B, latent_channels, H/f, W/f): each patch's coordinates in `frequency_basis`, to begin with.

    Divided by f, so that the first latent channel is a patch's mean brightness times the root of 3.
    """

    def __init__(self, in_channels: int, latent_channels: int, size: int):
        super().__init__(in_channels, latent_channels, size, stride=size, bias=False)
        with torch.no_grad():
            self.weight.copy_(frequency_basis(size, latent_channels, in_channels) / size)


class LatentsToPatches(nn.ConvTranspose2d):
    """The transpose of `PatchesToLatents`, which inverts it on the span of the basis, to begin with."""

    def __init__(self, latent_channels: int, out_channels: int, size: int):
        super().__init__(latent_channels, out_channels, size, stride=size, bias=False)
        with torch.no_grad():
            self.weight.copy_(frequency_basis(size, latent_channels, out_channels) * size)


@torch.no_grad()
def start_linear(vae: nn.Module, encoders: list, decoders: list) -> None:
    """Silences the networks of an autoencoder with a shortcut, so that training starts from the linear codec.

    Last layers of encoders and decoders are zero (the variances small), and the 1x1 convolutions around the latent
    the identity.
    """
    for network in (*encoders, *decoders):
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
    for network in encoders:
        half = network.conv_out.out_channels // 2
        network.conv_out.bias[half:] = LOGVAR_AT_START
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        if convolution is not None:
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)
