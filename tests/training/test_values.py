"""No setting, no argument of a model and no option takes what makes no sense; found by looking at all there are."""

import argparse
import dataclasses
import math
from typing import get_args, get_type_hints

import pytest
from conftest import TINY_CAT, TINY_FAVAE, TINY_HYPERPRIOR, TINY_LIGHTNINGDIT, TINY_VQ

from favae import cli
from favae.errors import ConfigError
from favae.ranges import Text
from favae.training.generator_config import GeneratorConfig
from favae.training.models import GENERATORS, NEED_TEACHER, TOKENIZERS, build_model, find_model_class
from favae.training.tokenizer_config import TokenizerConfig
from favae.training.validation import signature_schema, validate

NO_NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 1e300, "word", "", [], {"a": 1})
MAY_BE_NEGATIVE = ("shift_factor", "latents_mean", "latent_shift")
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
WIDTHS = {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "latent_channels": 6}
MODELS = {
    "AutoencoderKLFA": TINY_FAVAE,
    "AsymmetricAutoencoderKLFA": {**WIDTHS, **BLOCKS},
    "TwoBranchAutoencoderKL": {**WIDTHS, "high_block_out_channels": [8, 16], "high_latent_channels": 2},
    "VQModelFA": TINY_VQ,
    "HyperpriorModelFA": TINY_HYPERPRIOR,
    "AutoencoderKL": {**WIDTHS, **BLOCKS},
    "AutoencoderTinyFA": {"latent_channels": 6},
    "AutoencoderTiny": {"latent_channels": 6},
    "LightningDiTTransformer2DModel": TINY_LIGHTNINGDIT,
    "DiTTransformer2DModel": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4},
    "UNet2DModel": {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": 4,
    },
    "CATTransformerModel": TINY_CAT,
}


def leaves(schema: type, prefix: str = ""):
    """(key, type) of each setting that is no section."""
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def schema_of(model: str) -> type:
    return GeneratorConfig if model in GENERATORS else TokenizerConfig


def recipe(model: str) -> dict:
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in MODELS[model].items()}
    teacher = {"teacher": {"autoencoder": "a folder"}} if model in NEED_TEACHER else {}
    return {"model": {"name": model, **arguments}, "train": {"batch_size": 2}, **teacher}


def refused(model: str, key: str, value) -> None:
    """Checks that a recipe with this value is refused in one line that names the key."""
    settings = section = recipe(model)
    *sections, last = key.split(".")
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    with pytest.raises(ConfigError) as error:
        build_model(validate(schema_of(model), settings).model)
        pytest.fail(f"{key}={value} was taken")
    assert key in str(error.value) and "\n" not in str(error.value)


SETTINGS = [
    (schema, key, annotation)
    for schema in (TokenizerConfig, GeneratorConfig)
    for key, annotation in leaves(schema)
    if key not in ("model", "stages")
]


@pytest.mark.parametrize("schema, key, annotation", SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_settings(schema, key, annotation):
    model = "AutoencoderKLFA" if schema is TokenizerConfig else "LightningDiTTransformer2DModel"
    is_text = Text in (annotation, *get_args(annotation))
    for value in ("",) if is_text else NO_NUMBERS:
        refused(model, key, value)


ARGUMENTS = [
    (model, name) for model in MODELS for name in signature_schema(find_model_class(model).__init__).model_fields
]


@pytest.mark.parametrize("model, name", ARGUMENTS)
def test_arguments_of_models(model, name):
    for value in NO_NUMBERS:
        if name not in MAY_BE_NEGATIVE or value not in (-1, -0.5):
            refused(model, f"model.{name}", value)


def test_all_models_are_looked_at():
    assert set(MODELS) == {*TOKENIZERS, *GENERATORS}


@pytest.mark.parametrize(
    "model, key, value",
    [
        ("AutoencoderKL", "layers_per_block", 0),
        ("AutoencoderKL", "block_out_channels", [8, 8, 8, 16]),
        ("AutoencoderKL", "block_out_channels", [0, 8, 16]),
        ("AutoencoderKL", "block_out_channels", [8, 8, 15]),
        ("AutoencoderKL", "norm_num_groups", 3),
        ("AutoencoderKLFA", "norm_num_groups", 3),
        ("AutoencoderKLFA", "high_latent_channels", 6),
        ("AutoencoderKLFA", "latents_std", [1]),
        ("AutoencoderKLFA", "wavelet", "word"),
        ("DiTTransformer2DModel", "norm_type", "word"),
        ("DiTTransformer2DModel", "patch_size", 3),
        ("VQModelFA", "block_out_channels", [8, 8, 15]),
        ("LightningDiTTransformer2DModel", "patch_size", 3),
        ("LightningDiTTransformer2DModel", "num_layers", 0),
    ],
)
def test_sizes_that_do_not_fit_together(model, key, value):
    refused(model, f"model.{key}", value)


def parsers(parser: argparse.ArgumentParser):
    """Those of all subcommands."""
    children = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not children:
        yield parser
    for child in children:
        for each in child.choices.values():
            yield from parsers(each)


OPTIONS = [
    pytest.param(
        parser._registry_get("type", action.type, action.type),
        id=f"{parser.prog} {action.option_strings or action.dest}",
    )
    for parser in parsers(cli.build_parser())
    for action in parser._actions
    if action.nargs != 0 and not action.choices
]


@pytest.mark.parametrize("convert", OPTIONS)
def test_options(convert):
    try:
        is_number = isinstance(convert("1"), int | float)
    except argparse.ArgumentTypeError:
        is_number = False
    for text in ("", "-1", "nan", "inf", "1e400", "word") if is_number else ("",):
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)
