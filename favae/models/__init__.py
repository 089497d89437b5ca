"""Networks that `save_pretrained` writes. Their modules' paths are part of the file format of saved pipelines."""

from favae.models.autoencoder_kl_fa import AutoencoderKLFA
from favae.models.cat_transformer import CATTransformerModel
from favae.models.lightningdit_transformer_2d import LightningDiTTransformer2DModel
from favae.models.vq_model_fa import VQModelFA

__all__ = ["AutoencoderKLFA", "CATTransformerModel", "LightningDiTTransformer2DModel", "VQModelFA"]
