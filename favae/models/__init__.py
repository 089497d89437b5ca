"""Networks that `save_pretrained` writes. The paths of their modules are part of the file format of saved pipelines."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from favae.models.asymmetric_autoencoder_kl_fa import AsymmetricAutoencoderKLFA as AsymmetricAutoencoderKLFA
    from favae.models.autoencoder_kl_fa import AutoencoderKLFA as AutoencoderKLFA
    from favae.models.autoencoder_tiny_fa import AutoencoderTinyFA as AutoencoderTinyFA
    from favae.models.cat_transformer import CATTransformerModel as CATTransformerModel
    from favae.models.hyperprior_model_fa import HyperpriorModelFA as HyperpriorModelFA
    from favae.models.lightningdit_transformer_2d import (
        LightningDiTTransformer2DModel as LightningDiTTransformer2DModel,
    )
    from favae.models.pipeline_autoencoders import PackedNormAutoencoder as PackedNormAutoencoder
    from favae.models.pipeline_autoencoders import SingleFrameAutoencoder as SingleFrameAutoencoder
    from favae.models.two_branch_autoencoder_kl import TwoBranchAutoencoderKL as TwoBranchAutoencoderKL
    from favae.models.vq_model_fa import VQModelFA as VQModelFA

CLASSES_BY_MODULE = {
    "asymmetric_autoencoder_kl_fa": ["AsymmetricAutoencoderKLFA"],
    "autoencoder_kl_fa": ["AutoencoderKLFA"],
    "autoencoder_tiny_fa": ["AutoencoderTinyFA"],
    "cat_transformer": ["CATTransformerModel"],
    "hyperprior_model_fa": ["HyperpriorModelFA"],
    "lightningdit_transformer_2d": ["LightningDiTTransformer2DModel"],
    "pipeline_autoencoders": ["PackedNormAutoencoder", "SingleFrameAutoencoder"],
    "two_branch_autoencoder_kl": ["TwoBranchAutoencoderKL"],
    "vq_model_fa": ["VQModelFA"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=CLASSES_BY_MODULE)
