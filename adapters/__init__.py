"""How favae connects to other software: checkpoints of other programs here, pipelines of diffusers in `.pipelines`."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from favae.adapters.checkpoints import read_checkpoint as read_checkpoint
    from favae.adapters.favae_vq import vq_model_fa_from_favae_vq as vq_model_fa_from_favae_vq
    from favae.adapters.ldm import autoencoder_kl_from_ldm as autoencoder_kl_from_ldm
    from favae.adapters.ldm import ldm_from_autoencoder_kl as ldm_from_autoencoder_kl
    from favae.adapters.lightningdit import lightningdit_from_transformer as lightningdit_from_transformer
    from favae.adapters.lightningdit import transformer_from_lightningdit as transformer_from_lightningdit
    from favae.adapters.single_file import from_single_file as from_single_file
    from favae.adapters.single_file import read_latent_statistics as read_latent_statistics
    from favae.adapters.single_file import to_single_file as to_single_file
    from favae.adapters.taming import taming_from_vq_model as taming_from_vq_model
    from favae.adapters.taming import vq_model_from_taming as vq_model_from_taming

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["read_checkpoint"],
        "favae_vq": ["vq_model_fa_from_favae_vq"],
        "ldm": ["autoencoder_kl_from_ldm", "ldm_from_autoencoder_kl"],
        "lightningdit": ["lightningdit_from_transformer", "transformer_from_lightningdit"],
        "single_file": ["from_single_file", "read_latent_statistics", "to_single_file"],
        "taming": ["taming_from_vq_model", "vq_model_from_taming"],
    },
)
