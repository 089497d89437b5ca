"""VQGANs of taming-transformers, and the codebook models of latent diffusion, to and from diffusers' `VQModel`."""

from collections.abc import Mapping

from diffusers import VQModel
from torch import Tensor

from favae.adapters.checkpoints import required_tensor, state_shapes, tensors_from_original
from favae.adapters.ldm import autoencoder_tensors, config_from_ldm, ldm_locations, own_scaling_factor, to_ldm
from favae.errors import CheckpointError


def vq_model_from_taming(state: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A VQGAN as a [`VQModel`], with attention at the same levels.

    Args:
        state: `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`, `quantize.embedding.weight`; otherwise the
            layout of LDM's autoencoders. What only training needs is left out.
    Returns:
        The config and the state dict.
    Raises:
        CheckpointError: if names are missing or not of this layout, as those of a Gumbel quantizer, or shapes do not
            fit.
    Source: Esser et al., CVPR 2021.
    """
    scaling_factor = own_scaling_factor(state)
    state = autoencoder_tensors(state)
    if "quantize.embed.weight" in state:
        raise CheckpointError("has quantize.embed.weight of a Gumbel quantizer; VQModel takes the nearest entry")
    config = config_from_ldm(state)
    entries, dimension = required_tensor(state, "quantize.embedding.weight", 2).shape
    config |= {"num_vq_embeddings": entries, "vq_embed_dim": dimension, "scaling_factor": scaling_factor}
    shapes = state_shapes(VQModel, config)
    return config, tensors_from_original(state, ldm_locations(shapes, config), shapes)


def taming_from_vq_model(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vq_model_from_taming`.

    Raises:
        CheckpointError: if taming's code has no setting for something in the config.
    """
    if config.get("norm_type", "group") != "group":
        raise CheckpointError(f"norm_type is {config['norm_type']}, and taming's code has group only")
    return to_ldm(VQModel, config, state)
