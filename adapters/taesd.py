"""TAESD and TAEF2: tiny autoencoders of the latents of larger ones, as their files are published."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from favae import AutoencoderTinyFA
from favae.adapters.checkpoints import read_checkpoint
from favae.errors import CheckpointError

BLOCKS, HALVINGS = (1, 3, 3, 3), 3  # of the encoder; the decoder has the same in reverse


def autoencoder_from_taesd(encoder: str | Path, decoder: str | Path) -> AutoencoderTinyFA:
    """Opens an encoder and a decoder, such as `taesdxl_encoder.safetensors` or TAEF2's.

    Args:
        encoder, decoder: files of numbered layers, in which each block has three convolutions and perhaps a pool.
    Raises:
        CheckpointError: if a file cannot be read, or its layers are others.
    Source: madebyollin/taesd.
    """
    states = {"encoder": read_checkpoint(Path(encoder)), "decoder": read_checkpoint(Path(decoder))}
    try:
        width = len(states["decoder"]["1.bias"])
        latent_channels = states["decoder"]["1.weight"].shape[1]
    except KeyError as error:
        raise CheckpointError(f"{decoder} has no layer {error}, which TAESD's decoders begin with") from error
    model = AutoencoderTinyFA(
        latent_channels=latent_channels,
        block_out_channels=(width,) * (HALVINGS + 1),
        num_encoder_blocks=BLOCKS,
        decoder_block_out_channels=(width,) * (HALVINGS + 1),
        num_decoder_blocks=BLOCKS[::-1],
        latent_pooling=any(".pool." in name for name in states["decoder"]),
        wavelet_levels=0,
    )
    _load(model, {f"{part}.layers.{name}": value for part, state in states.items() for name, value in state.items()})
    return model.eval()


def _load(model: AutoencoderTinyFA, state: Mapping[str, Tensor]) -> None:
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in state or state[name].shape != value.shape:
            raise CheckpointError(f"TAESD's files have other layers: {name} is missing or of another shape")
    if set(state) - set(wanted):
        raise CheckpointError(f"TAESD's files have other layers: {min(set(state) - set(wanted))} is unknown")
    model.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()})
