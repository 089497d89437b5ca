"""favae: frequency-aware image tokenizers for latent diffusion."""

from favae.models import AutoencoderKLFA, CATTransformerModel, LightningDiTTransformer2DModel, VQModelFA
from favae.pipelines import CATPipeline, LightningDiTPipeline
from favae.wavelets import InverseWaveletTransform2D, WaveletTransform2D

__all__ = [
    "AutoencoderKLFA",
    "CATPipeline",
    "CATTransformerModel",
    "InverseWaveletTransform2D",
    "LightningDiTPipeline",
    "LightningDiTTransformer2DModel",
    "VQModelFA",
    "WaveletTransform2D",
]
