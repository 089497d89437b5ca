"""CAT trained by real processes on a tiny cache: codes and latents, resumed, in pairs, and what does not fit."""

import json

import pytest
import torch
import yaml
from conftest import TINY_CAT, TINY_VQ, refusal, run
from diffusers import DiffusionPipeline
from tiny_text import save_bert

from favae import CATPipeline, CATTransformerModel, VQModelFA
from favae.data.images import ImageDataset
from favae.data.latents import open_latents, write_latent_cache
from favae.data.sources import open_source
from favae.data.text_embeddings import write_text_embeddings
from favae.errors import ConfigError
from favae.text_encoder import TextEncoder
from favae.training.config import GeneratorConfig, load_config
from favae.training.text_to_image import check_shapes, open_text_embeddings

MODEL = {"name": "CATTransformerModel", **TINY_CAT}
FLOW = {"head": "flow", "latent_channels": 6, "low_latent_channels": 4, "head_width": 16, "head_layers": 1}


def prepare(folder, images, tokenizer, model):
    """Tokenizer, cache, text embeddings and a recipe in a folder."""
    source = open_source(str(images))
    for i, file in enumerate(source.files[:-1]):  # the last has no caption
        file.with_suffix(".txt").write_text("a red apple\nthe apple\n" if i % 2 else "the dog\n")
    tokenizer.save_pretrained(folder / "tokenizer")
    write_latent_cache(tokenizer, ImageDataset(source, 16), folder / "cache")
    write_text_embeddings(TextEncoder(str(save_bert(folder / "bert"))), folder / "cache")
    train = {"batch_size": 4, "steps": 6, "num_workers": 0, "log_every": 1, "sample_every": 3, "checkpoint_every": 2}
    recipe = {
        "model": model,
        "data": {"latents": str(folder / "cache"), "tokenizer": str(folder / "tokenizer")},
        "sampling": {"num_images": 4, "num_inference_steps": 2},
        "train": {**train, "ema_decay": 0.9, "tracker": None, "learning_rate": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture
def codes(tmp_path, image_folder):
    return prepare(tmp_path, image_folder, VQModelFA(**TINY_VQ).eval(), MODEL)


@pytest.fixture
def latents(tmp_path, image_folder, tiny_favae):
    return prepare(tmp_path, image_folder, tiny_favae, {**MODEL, **FLOW})


@pytest.mark.parametrize("kind, term, processes", [("codes", "cross_entropy", 2), ("latents", "velocity", 1)])
def test_it_trains_resumes_and_its_pipeline_opens(kind, term, processes, request, tmp_path):
    recipe = request.getfixturevalue(kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train_generator.py", recipe, f"output={whole}", processes=processes)
    run("train_generator.py", recipe, f"output={parts}", "train.steps=4", processes=processes)
    run("train_generator.py", recipe, f"output={parts}", processes=processes)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(record[term] > 0 for record in records) and len(records) == 6
    for file in sorted((whole / "final").rglob("*.safetensors")):
        assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes()
    pipe = DiffusionPipeline.from_pretrained(whole / "final")
    assert type(pipe) is CATPipeline and len(pipe(["a red apple", "the dog"]).images) == 2
    assert (whole / "samples/step-0000006.png").exists()
    assert not list((whole / "checkpoints").rglob("*text_encoder*"))  # it is nowhere but in the pipeline
    if kind == "latents":
        assert len(pipe.vae.config.latents_std) == 6


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.codebook_size=16", "a codebook of 32 entries, the generator is built for 16"),
        ("data.text_embeddings=NOWHERE", "NOWHERE holds no finished folder of text embeddings"),
        ("model={name: CATTransformerModel, head: flow, latent_channels: 6}", "holds tokens; model.head=flow"),
        ("data.text_encoder=NOWHERE", "text encoder 'NOWHERE' could not be loaded"),
    ],
)
def test_what_does_not_fit_is_one_line(codes, tmp_path, override, message):
    assert message in refusal(codes, f"output={tmp_path / 'run'}", override)


@pytest.mark.parametrize(
    "override, message",
    [
        ({"sample_size": 8}, r"tokens of shape \(4, 4\), the generator is built for \(8, 8\)"),
        ({"num_quantizers": 2}, r"tokens of shape \(4, 4\), the generator is built for \(4, 4, 2\)"),
        ({"text_dim": 5}, "have 8 channels, the generator is built for 5"),
    ],
)
def test_shapes_that_do_not_fit(codes, override, message):
    config = load_config(GeneratorConfig, codes)
    dataset = open_latents(config.data.latents, text_embeddings=open_text_embeddings(config))
    with pytest.raises(ConfigError, match=message):
        check_shapes(config, CATTransformerModel(**TINY_CAT | override), dataset)


def test_alignment_is_for_generators_of_classes(codes):
    with pytest.raises(ConfigError, match="loss.alignment.weight is for generators of classes"):
        load_config(GeneratorConfig, codes, ["loss.alignment.weight=1"])


def test_codes_are_not_for_generators_of_classes(codes, tmp_path):
    settings = yaml.safe_load(codes.read_text())
    settings["model"] = {"name": "LightningDiTTransformer2DModel", "sample_size": 4, "in_channels": 6, "num_classes": 3}
    codes.write_text(yaml.safe_dump(settings))
    refused = refusal(codes, f"output={tmp_path / 'run'}")
    assert "tokens of a codebook, which are for a CATTransformerModel" in refused


def test_an_encoder_that_takes_less_than_the_states_have(codes, tmp_path):
    save_bert(tmp_path / "short", max_length=7)
    refused = refusal(codes, f"output={tmp_path / 'run'}", f"data.text_encoder={tmp_path / 'short'}")
    assert "data.text_encoder: max_length of" in refused and "must be in 3 ... 7, got 12" in refused


def test_another_tokenizer_than_that_of_the_cache(codes, tmp_path):
    torch.manual_seed(1)
    VQModelFA(**TINY_VQ).save_pretrained(tmp_path / "other")
    refused = refusal(codes, f"output={tmp_path / 'run'}", f"data.tokenizer={tmp_path / 'other'}")
    assert "made by another tokenizer" in refused
