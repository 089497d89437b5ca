"""favae: frequency-aware image tokenizers for latent diffusion.

Everything below is imported when it is first used, so that `import favae` costs next to nothing.
"""

from typing import TYPE_CHECKING

import lazy_loader

from favae.pipelines.discovery import make_known_to_diffusers

if TYPE_CHECKING:
    from favae.models import AsymmetricAutoencoderKLFA as AsymmetricAutoencoderKLFA
    from favae.models import AutoencoderKLFA as AutoencoderKLFA
    from favae.models import AutoencoderTinyFA as AutoencoderTinyFA
    from favae.models import CATTransformerModel as CATTransformerModel
    from favae.models import HyperpriorModelFA as HyperpriorModelFA
    from favae.models import LightningDiTTransformer2DModel as LightningDiTTransformer2DModel
    from favae.models import PackedNormAutoencoder as PackedNormAutoencoder
    from favae.models import SingleFrameAutoencoder as SingleFrameAutoencoder
    from favae.models import TwoBranchAutoencoderKL as TwoBranchAutoencoderKL
    from favae.models import VQModelFA as VQModelFA
    from favae.pipelines import CATPipeline as CATPipeline
    from favae.pipelines import FlowMatchSDEScheduler as FlowMatchSDEScheduler
    from favae.pipelines import LightningDiTPipeline as LightningDiTPipeline
    from favae.wavelets import InverseWaveletTransform2D as InverseWaveletTransform2D
    from favae.wavelets import WaveletTransform2D as WaveletTransform2D

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "models": [
            "AsymmetricAutoencoderKLFA",
            "AutoencoderKLFA",
            "AutoencoderTinyFA",
            "CATTransformerModel",
            "HyperpriorModelFA",
            "LightningDiTTransformer2DModel",
            "PackedNormAutoencoder",
            "SingleFrameAutoencoder",
            "TwoBranchAutoencoderKL",
            "VQModelFA",
        ],
        "pipelines": ["CATPipeline", "FlowMatchSDEScheduler", "LightningDiTPipeline"],
        "wavelets": ["InverseWaveletTransform2D", "WaveletTransform2D"],
    },
)

make_known_to_diffusers()
