"""FLUX.2's autoencoder in the file of its authors, which ComfyUI reads as well, to and from `AutoencoderKLFlux2`.

The names are LDM's, but for the 1x1 convolutions, which are inside encoder and decoder, and the batch norm `bn` of the
latents. The decoder may be narrower than the encoder.
"""

import inspect
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

from favae.adapters.checkpoints import Location, required_tensor, state_shapes, tensors_from_original
from favae.adapters.ldm import autoencoder_tensors, config_from_ldm, ldm_locations, to_ldm
from favae.errors import CheckpointError
from favae.normalization import has_batch_norm, latent_mean_and_std

BATCH_NORM_EPS = 1e-4  # a constant in the programs that read these files
NEIGHBORS = 4  # latents that the batch norm stacks along the channels
BATCH_COUNTER = "bn.num_batches_tracked"
QUANT_CONVS = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}


def flux2_from_original(state: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The config and state of an [`AutoencoderKLFlux2`], from the authors' names.

    Raises:
        CheckpointError: if names are missing or not of this layout, or shapes do not fit.
    """
    state = autoencoder_tensors(state)
    required_tensor(state, "bn.running_mean", 1)
    config = config_from_ldm(state)
    levels = range(len(config["block_out_channels"]))
    config |= {
        "decoder_block_out_channels": [
            required_tensor(state, f"decoder.up.{i}.block.0.conv1.weight", 4).shape[0] for i in levels
        ],
        "sample_size": 1024,
        "batch_norm_eps": BATCH_NORM_EPS,
    }
    shapes = state_shapes(AutoencoderKLFlux2, config)
    del shapes[BATCH_COUNTER]
    state = {name: tensor for name, tensor in state.items() if name != BATCH_COUNTER}
    counter = {BATCH_COUNTER: torch.zeros((), dtype=torch.long)}  # is not used
    return config, tensors_from_original(state, _locations(shapes, config), shapes) | counter


def original_from_flux2(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flux2_from_original`.

    Raises:
        CheckpointError: if the authors' code has no setting for something in the config.
    """
    if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
        raise CheckpointError("FLUX.2's code needs quant_conv and post_quant_conv, and this autoencoder lacks them")
    named = {_original_name(name): tensor for name, tensor in to_ldm(AutoencoderKLFlux2, config, state).items()}
    variance = named["bn.running_var"].float() + config["batch_norm_eps"] - BATCH_NORM_EPS
    if variance.min() < 0:
        raise CheckpointError(f"the latents' variance is below the {BATCH_NORM_EPS} that FLUX.2's code adds")
    return named | {"bn.running_var": variance.to(named["bn.running_var"])}


@torch.no_grad()
def flux2_from_autoencoder_kl(vae: AutoencoderKL) -> AutoencoderKLFlux2:
    """A stock `AutoencoderKL` as an [`AutoencoderKLFlux2`], whose batch norm says what the config's statistics say.

    Args:
        vae: with both 1x1 convolutions. A `bn` of its own is kept.
    Returns:
        A model of the same networks, whose pipelines normalize its latents in the same way.
    Raises:
        CheckpointError: if the variance of the normalized latents is below what FLUX.2's code adds to it.
    """
    known = inspect.signature(AutoencoderKLFlux2).parameters
    model = AutoencoderKLFlux2(**{name: value for name, value in vae.config.items() if name in known})
    if has_batch_norm(vae):
        model.register_to_config(batch_norm_eps=vae.bn.eps)
        model.bn.eps = vae.bn.eps
        model.bn.load_state_dict(vae.bn.state_dict())
    else:
        shape = (vae.config.latent_channels, NEIGHBORS)
        mean, std = (values.view(-1, 1).expand(shape).flatten() for values in latent_mean_and_std(vae))
        model.bn.running_mean.copy_(mean)
        model.bn.running_var.copy_(std.square() - model.config.batch_norm_eps)
        if model.bn.running_var.min() < 0:
            raise CheckpointError(f"the latents' variance is below the {BATCH_NORM_EPS} that FLUX.2's code adds")
    state = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith("bn.")}
    statistics = {f"bn.{name}": tensor for name, tensor in model.bn.state_dict().items()}  # float32 in any case
    model.load_state_dict(state | statistics, assign=True)
    return model.eval()


def _locations(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> dict[str, Location]:
    return {
        key: Location(_original_name(location.name), convolution=location.convolution)
        for key, location in ldm_locations(shapes, config).items()
    }


def _original_name(name: str) -> str:
    for ours, theirs in QUANT_CONVS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
