"""The `model:` section of a recipe: which classes there are, what they take, and building one."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin

import favae
from favae.errors import ConfigError
from favae.training.validation import signature_schema, validate

TOKENIZERS = (
    "AutoencoderKLFA",
    "AsymmetricAutoencoderKLFA",
    "TwoBranchAutoencoderKL",
    "VQModelFA",
    "AutoencoderKL",
)
GENERATORS = ("LightningDiTTransformer2DModel", "DiTTransformer2DModel", "CATTransformerModel")
FROM_AUTOENCODER_KL = "from_autoencoder_kl"  # key: the autoencoder whose encoder is kept, frozen


@dataclass
class PretrainedSource:
    """Where a pretrained model is: a folder or hub name, and the folder inside it."""

    path: str
    subfolder: str | None = None


def find_model_class(name: str) -> type[ModelMixin]:
    """A class of ours or of diffusers by its name, or any class by its path, such as "my_package.models.MyVAE".

    Raises:
        ConfigError: if there is no such class.
    """
    module, _, attribute = name.rpartition(".")
    if "." not in name:
        return getattr(favae, name, None) or getattr(diffusers, name)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.name: {name} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ConfigError(f"model.name: {name} is no class of models of diffusers (a subclass of ModelMixin)")
    return found


def check_model(settings: dict[str, Any], names: tuple[str, ...]) -> None:
    """Checks a `model:` section: its name, and the type of each argument of the constructor.

    Args:
        names: of the classes that this training takes; the path of another class is taken as well.
    Raises:
        ConfigError: for the first mistake.
    """
    name = settings.get("name")
    if name not in names and "." not in str(name):
        raise ConfigError(f"model.name must be one of {', '.join(names)}, or the path of a class; got {name}")
    _arguments(settings)


def build_model(settings: dict[str, Any]) -> ModelMixin:
    """The model that a `model:` section describes.

    Raises:
        ConfigError: if its constructor refuses the values, or a pretrained autoencoder cannot be opened.
    """
    build, arguments = _arguments(settings)
    try:
        return build(**arguments)
    except (ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
        raise ConfigError(_naming_keys(error, build, arguments)) from error


def _naming_keys(error: Exception, build: Callable, arguments: dict[str, Any]) -> str:
    """The message of a constructor, with model.KEY for each argument that it names."""
    message = " ".join(str(error).split()) or type(error).__name__
    for torch_name, name in {"num_channels": "block_out_channels", "num_groups": "norm_num_groups"}.items():
        message = re.sub(rf"\b{torch_name}\b", name, message)
    names = {*arguments, *inspect.signature(build).parameters}
    named = re.sub(r"(?<![\w.])\w+", lambda word: f"model.{word[0]}" if word[0] in names else word[0], message)
    return named if named.startswith("model.") else f"model: {named}"


def _arguments(settings: dict[str, Any]) -> tuple[Callable[..., ModelMixin], dict[str, Any]]:
    """What builds the model, and its checked arguments."""
    model_class = find_model_class(settings["name"])
    given = {key: value for key, value in settings.items() if key != "name"}
    if FROM_AUTOENCODER_KL not in given:
        checked = validate(signature_schema(model_class.__init__), given, "model")
        _check_sizes(vars(checked))
        return model_class, {key: getattr(checked, key) for key in given}

    source = given.pop(FROM_AUTOENCODER_KL)
    source = validate(
        PretrainedSource, source if isinstance(source, dict) else {"path": source}, f"model.{FROM_AUTOENCODER_KL}"
    )
    if model_class is AutoencoderKL:
        build, schema = _freeze_encoder, signature_schema(_freeze_encoder, skip=("vae",))
    elif hasattr(model_class, FROM_AUTOENCODER_KL):
        build = model_class.from_autoencoder_kl
        schema = signature_schema(build, skip=("vae",))
    else:
        raise ConfigError(f"unknown key model.{FROM_AUTOENCODER_KL}: a {settings['name']} has an encoder of its own")
    checked = validate(schema, given, "model")
    options = {key: getattr(checked, key) for key in given}
    return lambda **keys: build(_open_autoencoder_kl(source), **keys), options


def _check_sizes(arguments: dict[str, Any]) -> None:
    """Raises ConfigError for sizes that do not fit together, which diffusers' models cut off or find in the first step.

    Args:
        arguments: of the constructor, all of them.
    """
    size, patch = arguments.get("sample_size"), arguments.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and size % patch:
        raise ConfigError(f"model.sample_size = {size} must be a multiple of model.patch_size = {patch}")
    lengths = {
        **dict.fromkeys(("down_block_types", "up_block_types"), len(arguments.get("block_out_channels", ()))),
        **dict.fromkeys(("latents_mean", "latents_std"), arguments.get("latent_channels")),
    }
    for key, length in lengths.items():
        values = arguments.get(key)
        if values is not None and len(values) != length:
            of = "block_out_channels" if key.endswith("types") else "latent_channels"
            raise ConfigError(f"model.{key} must have as many entries as model.{of}, {length}, got {len(values)}")


def _open_autoencoder_kl(source: PretrainedSource) -> AutoencoderKL:
    options = {} if source.subfolder is None else {"subfolder": source.subfolder}
    with torch.device("cpu"):  # its weights exist, even in a dry run on the meta device
        try:
            found = AutoencoderKL.load_config(source.path, **options)["_class_name"]
            vae = AutoencoderKL.from_pretrained(source.path, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"model.{FROM_AUTOENCODER_KL}: there is no AutoencoderKL at {source.path}, in a folder or on the hub "
                f"({str(error).splitlines()[0]})"
            ) from error
    if found != "AutoencoderKL":
        raise ConfigError(f"model.{FROM_AUTOENCODER_KL}: {source.path} is a {found}, not a stock AutoencoderKL")
    return vae


def _freeze_encoder(vae: AutoencoderKL) -> AutoencoderKL:
    """A stock autoencoder of which the decoder alone is trained."""
    for part in (vae.encoder, vae.quant_conv):
        if part is not None:
            part.requires_grad_(False)
    return vae
