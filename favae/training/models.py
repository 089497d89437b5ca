"""The `model:` section of a recipe: which classes there are, what they take, and building one."""

import inspect

import diffusers
import torch

from favae.errors import ConfigError
from favae.models import AutoencoderKLFA, CATTransformerModel, LightningDiTTransformer2DModel, VQModelFA
from favae.training.checks import one_of

TOKENIZERS = {"AutoencoderKLFA": AutoencoderKLFA, "VQModelFA": VQModelFA, "AutoencoderKL": diffusers.AutoencoderKL}
FROZEN = "from_autoencoder_kl"  # model: the autoencoder whose latent space a decoder is trained for
GENERATORS = {
    "LightningDiTTransformer2DModel": LightningDiTTransformer2DModel,
    "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
    "CATTransformerModel": CATTransformerModel,
}


def check_model(settings: dict, classes: dict[str, type]) -> None:
    """`model:` is the constructor's arguments and the class's name."""
    if "name" not in settings:
        raise ConfigError(f"model.name is missing; it is one of {', '.join(classes)}")
    one_of("model.name", settings["name"], classes)
    allowed = [name for name in inspect.signature(classes[settings["name"]].__init__).parameters if name != "self"]
    if settings["name"] == "AutoencoderKLFA":
        allowed += [FROZEN, "warm_start"]
    elif settings["name"] == "AutoencoderKL" and FROZEN in settings:
        allowed = [FROZEN]
    if not isinstance(settings.get(FROZEN, ""), str) and set(settings[FROZEN]) - {"subfolder"} != {"path"}:
        raise ConfigError(f"model.{FROZEN} is a folder or hub name, or {{path: ..., subfolder: ...}}")
    for key in settings:
        if key not in allowed and key != "name":
            raise ConfigError(f"unknown key model.{key}; {settings['name']} takes {', '.join(allowed)}")


def build_model(settings: dict, classes: dict[str, type]):
    """The model that a checked `model:` section describes.

    Raises:
        ConfigError: if its constructor refuses the values.
    """
    arguments = {key: value for key, value in settings.items() if key != "name"}
    try:
        if FROZEN in arguments:
            with torch.device("cpu"):  # its weights exist, whatever a dry run says
                return _with_frozen_encoder(classes[settings["name"]], **arguments)
        return classes[settings["name"]](**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error


def _with_frozen_encoder(kind: type, from_autoencoder_kl: str | dict, **settings) -> diffusers.AutoencoderKL:
    """A decoder for the latent space of a pretrained autoencoder, its own or an `AutoencoderKLFA`'s.

    Args:
        from_autoencoder_kl: a folder or hub name, or {path: ..., subfolder: ...}.
    """
    source = {"path": from_autoencoder_kl} if isinstance(from_autoencoder_kl, str) else dict(from_autoencoder_kl)
    path = source.pop("path")
    try:
        found = diffusers.AutoencoderKL.load_config(path, **source)["_class_name"]
        vae = diffusers.AutoencoderKL.from_pretrained(path, **source) if found == "AutoencoderKL" else None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"model.{FROZEN}: {path} is neither a folder with an autoencoder nor to be had from the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    if vae is None:
        raise ConfigError(f"model.{FROZEN}: {path} is a {found}, not a stock AutoencoderKL")
    if kind is AutoencoderKLFA:
        return AutoencoderKLFA.from_autoencoder_kl(vae, **settings)
    for part in (vae.encoder, vae.quant_conv):
        if part is not None:
            part.requires_grad_(False)
    return vae
