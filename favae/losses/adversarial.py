"""The patch discriminator, its hinge losses, and the weight that keeps a loss in proportion to another."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from favae.channels import in_color


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """Classifies overlapping patches, of 70 x 70 pixels with the defaults, as real or reconstructed.

    Args:
        channels: width of the first layer; each further layer doubles it, up to eight times this number.
        num_layers: number of layers of stride 2.

    Source: PatchGAN of Isola et al., CVPR 2017, with the layout common to VQGAN and VA-VAE.
    """

    @register_to_config
    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], seen `in_color` -> a logit per patch, (B, 1, h, w), higher for real ones."""
        return self.layers(in_color(images))


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L = (mean relu(1 - real) + mean relu(1 + fake)) / 2, which the discriminator minimizes.

    Args:
        real_logits, fake_logits: of the discriminator, any shapes and floating dtypes; computed in float32.
    Returns:
        Scalar >= 0.
    Source: Lim and Ye, 2017 (arXiv 1705.02894).
    """
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()) / 2


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """L = -mean fake, which the autoencoder minimizes against a hinge discriminator.

    Args:
        fake_logits: of the discriminator for reconstructions, any shape and floating dtype; computed in float32.
    Returns:
        Scalar.
    Source: Lim and Ye, 2017 (arXiv 1705.02894).
    """
    return -fake_logits.float().mean()


def adaptive_weight(reference: Tensor, loss: Tensor, weights: list[Tensor], maximum: float) -> Tensor:
    """The factor by which `loss` gets the same gradient norm as `reference` at the given weights.

    w = ||d reference / d W|| / (||d loss / d W|| + 1e-4 ||d reference / d W||), at most `maximum`, not differentiated.

    The published epsilon is absolute (1e-4), and the published ceiling so high that a loss that is about to vanish gets
    an enormous factor. Here the epsilon is relative, so the factor does not depend on how the losses are scaled.

    Args:
        reference, loss: scalars with a graph to `weights`.
        weights: tensors W of the last layer that both losses reach.
        maximum: the ceiling.
    Returns:
        Scalar >= 0.
    Source: Esser et al., CVPR 2021 (VQGAN), eq. 7.
    """
    norms = []
    for value in (reference, loss):
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        zero = torch.zeros((), device=value.device)
        norms.append(sum((g.float().square().sum() for g in gradients), start=zero).sqrt())
    return (norms[0] / (norms[1] + 1e-4 * norms[0]).clamp_min(1e-12)).clamp(0, maximum).detach()
