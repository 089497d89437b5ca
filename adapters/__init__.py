"""What connects favae to software that exists: checkpoints of other programs here, pipelines in `.diffusers`."""

from favae.adapters.checkpoints import read_checkpoint
from favae.adapters.favae_vq import vq_model_fa_from_favae_vq
from favae.adapters.ldm import autoencoder_kl_from_ldm, ldm_from_autoencoder_kl
from favae.adapters.lightningdit import lightningdit_from_transformer, transformer_from_lightningdit
from favae.adapters.single_file import from_single_file, read_latent_statistics, to_single_file
from favae.adapters.taming import taming_from_vq_model, vq_model_from_taming

__all__ = [
    "CheckpointError",
    "autoencoder_kl_from_ldm",
    "from_single_file",
    "ldm_from_autoencoder_kl",
    "lightningdit_from_transformer",
    "read_checkpoint",
    "read_latent_statistics",
    "taming_from_vq_model",
    "to_single_file",
    "transformer_from_lightningdit",
    "vq_model_fa_from_favae_vq",
    "vq_model_from_taming",
]
