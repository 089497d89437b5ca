"""The `model:` section of a recipe: which classes there are, what they take, and building one."""

import importlib
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, DiTTransformer2DModel, ModelMixin
from torch import nn

from favae.errors import ConfigError, one_line
from favae.models.class_conditional import initialize_dit
from favae.models.hub import find_class
from favae.models.vq_model_fa import QUANTIZERS_WITH, VQModelFA
from favae.ranges import Text
from favae.training.validation import signature_schema, validate

logger = logging.getLogger(__name__)

TOKENIZERS = (
    "AutoencoderKLFA",
    "AsymmetricAutoencoderKLFA",
    "TwoBranchAutoencoderKL",
    "VQModelFA",
    "HyperpriorModelFA",
    "AutoencoderKL",
    "AutoencoderTinyFA",
    "AutoencoderTiny",
)
NEED_TEACHER = ("AutoencoderTinyFA", "AutoencoderTiny")  # they have no posterior
GENERATORS = ("LightningDiTTransformer2DModel", "DiTTransformer2DModel", "UNet2DModel", "CATTransformerModel")
FROM_AUTOENCODER_KL = "from_autoencoder_kl"  # key: the autoencoder whose encoder is kept, frozen
FROM_PRETRAINED = "from_pretrained"  # key: the model that training begins with


@dataclass
class PretrainedSource:
    """Where a pretrained model is: a folder or hub name, and the folder inside it."""

    path: Text
    subfolder: Text | None = None

    @classmethod
    def parse(cls, settings: Any, key: str) -> "PretrainedSource":
        """Of PATH, PATH:SUBFOLDER, or a section with both. Raises ConfigError for something else."""
        if isinstance(settings, str) and ":" in settings and not Path(settings).exists():
            path, _, subfolder = settings.rpartition(":")
            settings = {"path": path, "subfolder": subfolder}
        return validate(cls, settings if isinstance(settings, dict) else {"path": settings}, f"model.{key}")

    @property
    def options(self) -> dict[str, str]:
        return {} if self.subfolder is None else {"subfolder": self.subfolder}


def find_model_class(name: str) -> type[ModelMixin]:
    """A class of ours or of diffusers by its name, or any class by its path, such as "my_package.models.MyVAE".

    Raises:
        ConfigError: if there is no such class.
    """
    module, _, attribute = name.rpartition(".")
    if "." not in name:
        return find_class(name)
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
    if not isinstance(name, str) or (name not in names and "." not in name):
        raise ConfigError(f"model.name must be one of {', '.join(names)}, or the path of a class; got {name}")
    _arguments(settings)


def build_model(settings: dict[str, Any]) -> ModelMixin:
    """The model that a `model:` section describes.

    Raises:
        ConfigError: if its constructor refuses the values, or a pretrained autoencoder cannot be opened.
    """
    source = settings.get(FROM_PRETRAINED)
    if source is not None:
        return _start_from(PretrainedSource.parse(source, FROM_PRETRAINED), settings)
    build, arguments = _arguments(settings)
    try:
        model = build(**arguments)
        if isinstance(model, DiTTransformer2DModel):
            initialize_dit(model)
        return model
    except (ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
        raise ConfigError(_naming_keys(error, build, arguments)) from error


def enable_gradient_checkpointing(model: ModelMixin) -> None:
    """Raises ConfigError if the model does not have it."""
    if not model._supports_gradient_checkpointing:
        raise ConfigError(f"train.gradient_checkpointing is not there for a {type(model).__name__}")
    model.enable_gradient_checkpointing()
    if isinstance(model, AutoencoderTiny):
        model.encoder.gradient_checkpointing = False  # diffusers takes images in another range then


def lay_out_channels_last(module: nn.Module) -> None:
    """Lays out what has four dimensions, as the weights of convolutions of images. Those of videos, which a teacher may
    have, cannot be laid out so."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def inherit_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A `model:` section with what it does not say as in the model that it begins with, if the class has it.

    Raises:
        ConfigError: if there is no such model.
    """
    if settings.get(FROM_PRETRAINED) is None:
        return settings
    source = PretrainedSource.parse(settings[FROM_PRETRAINED], FROM_PRETRAINED)
    model_class = find_model_class(settings["name"])
    known = signature_schema(model_class.__init__).model_fields
    with _opening(source, FROM_PRETRAINED):
        config = model_class.load_config(source.path, **source.options)
    return {**{name: value for name, value in config.items() if name in known}, **settings}


@contextmanager
def _opening(source: PretrainedSource, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ConfigError(f"model.{key}: no model at {source.path}, in a folder or on the hub ({reason})") from error


def _start_from(source: PretrainedSource, settings: dict[str, Any]) -> ModelMixin:
    """A model of these settings that begins with the weights of another one, as far as names and shapes agree.

    A warning names what begins anew.

    Raises:
        ConfigError: if there is no such model, or not one of its weights fits.
    """
    key = f"model.{FROM_PRETRAINED}"
    settings = inherit_settings(settings)
    with torch.device("cpu"), _opening(source, FROM_PRETRAINED):  # its weights exist, even in a dry run on meta
        model_class = find_model_class(settings["name"])
        name = model_class.load_config(source.path, **source.options)["_class_name"]
        other_class = model_class if name == model_class.__name__ else find_model_class(name)
        other = other_class.from_pretrained(source.path, **source.options)
    model = build_model({name: value for name, value in settings.items() if name != FROM_PRETRAINED})
    weights, wanted = other.state_dict(), model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in wanted and wanted[name].shape == value.shape}
    if not fitting:
        raise ConfigError(f"{key}: no weight of the {type(other).__name__} at {source.path} fits this model")
    anew = [name for name in wanted if name not in fitting]
    if anew:
        shown = ", ".join(anew[:4]) + (", ..." if len(anew) > 4 else "")
        logger.warning("%s: %d of %d tensors begin anew: %s", key, len(anew), len(wanted), shown)
    model.load_state_dict(fitting, strict=False)
    return model


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
    given = {key: value for key, value in settings.items() if key not in ("name", FROM_PRETRAINED, FROM_AUTOENCODER_KL)}
    begins, keeps = (settings.get(key) is not None for key in (FROM_PRETRAINED, FROM_AUTOENCODER_KL))
    if begins and keeps:
        raise ConfigError(
            f"model.{FROM_PRETRAINED} and model.{FROM_AUTOENCODER_KL} are two beginnings; with the latter null, "
            "train.parts=decoder keeps the encoder as it is"
        )
    if not keeps:
        checked = validate(signature_schema(model_class.__init__), given, "model")
        if not begins:  # or what is not given is as in that model
            _check_sizes(vars(checked))
            if model_class is AutoencoderTiny:
                _check_tiny(checked)
            if model_class is VQModelFA:
                _check_quantizer(checked)
        return model_class, {key: getattr(checked, key) for key in given}

    source = PretrainedSource.parse(settings[FROM_AUTOENCODER_KL], FROM_AUTOENCODER_KL)
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
        if values is not None and length is not None and len(values) != length:
            of = "block_out_channels" if key.endswith("types") else "latent_channels"
            raise ConfigError(f"model.{key} must have as many entries as model.{of}, {length}, got {len(values)}")


def _check_tiny(arguments: Any) -> None:
    """Raises ConfigError for sizes that diffusers' `AutoencoderTiny` finds in the first step, or never."""
    widths = [list(arguments.encoder_block_out_channels), list(arguments.decoder_block_out_channels)]
    if len(widths[0]) != len(widths[1]) or any(len(set(each)) > 1 for each in widths):
        raise ConfigError(
            "model.encoder_block_out_channels and model.decoder_block_out_channels of an AutoencoderTiny must have one "
            f"length, and one width each, got {widths[0]} and {widths[1]}"
        )
    factor = arguments.upsampling_scaling_factor
    if factor != 2:
        raise ConfigError(f"model.upsampling_scaling_factor must be 2, as images are halved, got {factor}")


def _check_quantizer(arguments: Any) -> None:
    """Raises ConfigError for a setting of another quantizer, without effect; saved configs have the defaults."""
    defaults = inspect.signature(VQModelFA.__init__).parameters
    for key, quantizers in QUANTIZERS_WITH.items():
        if arguments.quantizer not in quantizers and getattr(arguments, key) != defaults[key].default:
            wanted = " or ".join(quantizers)
            raise ConfigError(f"model.{key} is for model.quantizer={wanted}, not {arguments.quantizer}")


def _open_autoencoder_kl(source: PretrainedSource) -> AutoencoderKL | AutoencoderKLFlux2:
    with torch.device("cpu"), _opening(source, FROM_AUTOENCODER_KL):  # its weights exist, even in a dry run on meta
        found = AutoencoderKL.load_config(source.path, **source.options)["_class_name"]
        model_class = AutoencoderKLFlux2 if found == "AutoencoderKLFlux2" else AutoencoderKL
        vae = model_class.from_pretrained(source.path, **source.options)
    if found != model_class.__name__:
        raise ConfigError(
            f"model.{FROM_AUTOENCODER_KL}: {source.path} is a {found}, no stock AutoencoderKL or AutoencoderKLFlux2. "
            "As teacher.autoencoder it gives latents to a model that has an encoder of its own"
        )
    return vae


def _freeze_encoder(vae: AutoencoderKL | AutoencoderKLFlux2) -> AutoencoderKL | AutoencoderKLFlux2:
    """A stock autoencoder of which the decoder alone is trained."""
    for part in (vae.encoder, vae.quant_conv):
        if part is not None:
            part.requires_grad_(False)
    return vae
