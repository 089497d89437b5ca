"""Models as files of other programs: what `favae export` writes."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from diffusers import AutoencoderKL, ModelMixin

from favae import LightningDiTTransformer2DModel
from favae.adapters.convert import check_new_folder
from favae.adapters.flux2 import flux2_from_autoencoder_kl
from favae.adapters.single_file import find_layout, to_single_file
from favae.autoencoders import load_autoencoder
from favae.errors import CheckpointError, hint
from favae.files import atomic_path
from favae.models.pipeline_autoencoders import AutoencoderAdapter, PackedNormAutoencoder

logger = logging.getLogger(__name__)

# What ComfyUI, A1111 and Forge assume of every file in LDM's layout.
ENCODER_WIDTHS = (128, 256, 512, 512)
DECODER_MULTIPLES = (1, 2, 4, 4)
ELSEWHERE = "--format onnx writes any autoencoder, and adapters/comfyui has a node that opens ours"


def export(source: str | Path, destination: str | Path, *, format: str) -> None:
    """Writes a saved model in a layout of other programs.

    Args:
        source: a folder or a hub name of an autoencoder, of a pipeline, or, for "lightningdit", of a transformer.
        destination: for "onnx" a new folder, otherwise a .safetensors or .pt file that does not exist. The former has
            the tensors alone, the latter the containers that the original's code expects.
        format: "onnx", or one of `FORMATS` that can be written.
    Raises:
        CheckpointError: if the destination exists, or the format cannot hold the model.
        ModelError: if there is no autoencoder, or ONNX cannot express it.
    """
    destination = Path(destination)
    if format == "onnx":
        from favae.adapters.onnx_files import save_onnx

        check_new_folder(destination)
        vae = load_autoencoder(str(source))
        with atomic_path(destination.resolve()) as temporary:
            save_onnx(vae, temporary)
        return

    if destination.exists():
        raise CheckpointError(f"{destination} exists; name a new file")
    model_class = find_layout(format).model_class
    if model_class is LightningDiTTransformer2DModel:
        model: ModelMixin = _open_transformer(str(source))
    else:
        model = load_autoencoder(str(source))
    if isinstance(model, AutoencoderAdapter):  # of a pipeline whose autoencoder was swapped
        if isinstance(model, PackedNormAutoencoder) and format == "flux2":
            model.autoencoder.bn = model.bn
        model = model.autoencoder
    if format == "flux2" and type(model) is AutoencoderKL:
        model = flux2_from_autoencoder_kl(model)
    is_autoencoder = not isinstance(model, LightningDiTTransformer2DModel)
    with hint(ELSEWHERE) if is_autoencoder and type(model) is not model_class else nullcontext():
        to_single_file(model, destination, format)
    if format in ("ldm", "flux2") and (found := differences_from_comfyui(model.config)):
        logger.warning("ComfyUI, A1111 and Forge cannot read %s: it has %s", destination, "; ".join(found))


def differences_from_comfyui(config: Mapping) -> list[str]:
    """What programs that know LDM's layout by its names alone would take for something else.

    Args:
        config: of an `AutoencoderKL` or an `AutoencoderKLFlux2`.
    Source: `comfy/sd.py` of ComfyUI.
    """
    widths = tuple(config["block_out_channels"])
    decoder = tuple(config.get("decoder_block_out_channels") or widths)
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    levels = len(widths)
    checks = {
        f"encoder widths {widths}, not {ENCODER_WIDTHS}": widths != ENCODER_WIDTHS[:levels] or levels not in (3, 4),
        f"decoder widths {decoder}, not multiples {DECODER_MULTIPLES}": decoder
        != tuple(decoder[0] * multiple for multiple in DECODER_MULTIPLES[:levels]),
        f"{config['layers_per_block']} layers per block, not 2": config["layers_per_block"] != 2,
        "attention in its levels": any(name.startswith("Attn") for name in blocks),
        "no attention in the middle": not config["mid_block_add_attention"],
        "one of quant_conv and post_quant_conv": config["use_quant_conv"] != config["use_post_quant_conv"],
        f"{config['latent_channels']} latent channels, as another network": config["latent_channels"] == 64,
    }
    return [difference for difference, holds in checks.items() if holds]


def _open_transformer(path: str) -> LightningDiTTransformer2DModel:
    """The transformer at a path, a folder or a hub name; of a pipeline its `transformer`."""
    options = {}
    try:
        try:
            config = LightningDiTTransformer2DModel.load_config(path)
        except OSError:
            options = {"subfolder": "transformer"}
            config = LightningDiTTransformer2DModel.load_config(path, **options)
        if (name := config["_class_name"]) != LightningDiTTransformer2DModel.__name__:
            raise CheckpointError(f"{path}: a {name} is no LightningDiTTransformer2DModel")
        return LightningDiTTransformer2DModel.from_pretrained(path, **options)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no transformer could be opened ({str(error).splitlines()[0]})") from error
