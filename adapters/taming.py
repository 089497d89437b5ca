"""VQGANs of taming-transformers, and the codebook models of latent diffusion, to and from diffusers' `VQModel`."""

from collections.abc import Mapping

from diffusers import VQModel
from torch import Tensor

from favae.adapters.checkpoints import need, shapes_of, take
from favae.adapters.ldm import config_from_ldm, entries, of_autoencoder, to_ldm
from favae.errors import CheckpointError


def vq_model_from_taming(state: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A VQGAN as a [`VQModel`], with attention at the levels where it has attention.

    Args:
        state: `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`, `quantize.embedding.weight`; the layout of
            LDM's autoencoders otherwise. What only training needs is left out.
    Returns:
        The config and the state dict.
    Raises:
        CheckpointError: for names that are missing or not of this layout (a Gumbel quantiser has another), and for
            other shapes.
    Source: Esser et al., CVPR 2021.
    """
    state = of_autoencoder(state)
    if "quantize.embed.weight" in state:
        raise CheckpointError("has quantize.embed.weight, a Gumbel quantiser's; VQModel has the nearest entry's only")
    config = config_from_ldm(state)
    embeddings, dimension = need(state, "quantize.embedding.weight", 2).shape
    config |= {"num_vq_embeddings": embeddings, "vq_embed_dim": dimension, "scaling_factor": 1.0}
    shapes = shapes_of(VQModel, config)
    return config, take(state, entries(shapes, config), shapes)


def taming_from_vq_model(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vq_model_from_taming`.

    Raises:
        CheckpointError: for what taming's code has no setting for.
    """
    if config.get("norm_type", "group") != "group":
        raise CheckpointError(f"norm_type is {config['norm_type']}, and taming's code knows only group")
    return to_ldm(VQModel, config, state)
