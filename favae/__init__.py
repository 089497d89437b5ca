"""favae: frequency-aware image tokenizers for latent diffusion."""

from favae.models import AutoencoderKLFA, LightningDiTTransformer2DModel, VQModelFA
from favae.pipelines import LightningDiTPipeline
from favae.wavelets import InverseWaveletTransform2D, WaveletTransform2D

__all__ = [
    "AutoencoderKLFA",
    "InverseWaveletTransform2D",
    "LightningDiTPipeline",
    "LightningDiTTransformer2DModel",
    "VQModelFA",
    "WaveletTransform2D",
]
