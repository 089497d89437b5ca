"""CAT trained by real processes on a tiny cache: codes and latents, resumed, in pairs, and what does not fit."""

import json

import pytest
import torch
import yaml
from conftest import TINY_CAT, TINY_LIGHTNINGDIT, TINY_VQ, refusal, train_in_processes, train_whole_and_in_parts
from diffusers import DiffusionPipeline
from tiny_text import save_bert

from favae import CATPipeline, CATTransformerModel, LightningDiTPipeline, VQModelFA
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import open_latents
from favae.data.sources import open_source
from favae.data.text_embeddings import write_text_embeddings
from favae.errors import ConfigError, DataError
from favae.eval.sampling import sample_to_folder
from favae.text_encoder import TextEncoder
from favae.training.autoregression import check_tokens
from favae.training.config import load_config
from favae.training.generator_config import GeneratorConfig
from train_generator import open_cache, sampling_options

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
        "sampling": {"num_images": 4, **({"num_inference_steps": 2} if model.get("head") == "flow" else {})},
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


@pytest.fixture(params=["next_scale", "next_band"])
def stages(tmp_path, image_folder, request):
    scales = [1, 2, 4]
    tokenizer = VQModelFA(**TINY_VQ, quantizer=request.param, scales=scales).eval()
    return prepare(tmp_path, image_folder, tokenizer, {**MODEL, "order": request.param, "scales": scales})


def test_stages_train_resume_and_are_sampled(stages, tmp_path):
    whole = train_whole_and_in_parts("train_generator", tmp_path, stages, steps=6, first=4)
    pipe = DiffusionPipeline.from_pretrained(whole / "final")
    assert len(pipe(["a red apple", "the dog"], guidance_scale=2.0).images) == 2
    with pytest.raises(ValueError, match="the autoencoder needs raster"):
        CATPipeline(pipe.transformer, VQModelFA(**TINY_VQ), pipe.text_encoder, pipe.tokenizer)
    named = refusal("train_generator", stages, "model.order=raster", "model.scales=null")
    assert "model.sample_size, model.num_quantizers" in named
    if pipe.transformer.config.order == "next_band":  # as many tokens
        assert "the autoencoder needs" in refusal("train_generator", stages, "model.scales=[2,4]")


@pytest.mark.parametrize("cached, loss", [("codes", "cross_entropy"), ("latents", "velocity")])
def test_it_trains_resumes_and_its_pipeline_opens(cached, loss, request, tmp_path):
    recipe = request.getfixturevalue(cached)
    whole = train_whole_and_in_parts("train_generator", tmp_path, recipe, steps=6, first=4)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(record[loss] > 0 for record in records) and len(records) == 6
    pipe = DiffusionPipeline.from_pretrained(whole / "final")
    assert type(pipe) is CATPipeline and len(pipe(["a red apple", "the dog"]).images) == 2
    assert (whole / "samples/step-0000006.png").exists()
    assert not list((whole / "checkpoints").rglob("*text_encoder*"))  # it is nowhere but in the pipeline
    if cached == "latents":
        assert len(pipe.vae.config.latents_std) == 6


@pytest.fixture
def flow(tmp_path, image_folder, tiny_favae):
    model = {"name": "LightningDiTTransformer2DModel", **TINY_LIGHTNINGDIT, "num_classes": 0, "text_dim": 8}
    return prepare(tmp_path, image_folder, tiny_favae, model)


def test_lightningdit_learns_texts_resumes_and_is_sampled(flow, tmp_path):
    whole = train_whole_and_in_parts("train_generator", tmp_path, flow, steps=6, first=4)
    pipe = DiffusionPipeline.from_pretrained(whole / "final")
    assert type(pipe) is LightningDiTPipeline
    assert len(pipe(prompt=["a red apple", "the dog"], num_inference_steps=2).images) == 2
    assert (whole / "samples/step-0000006.png").exists()
    sample_to_folder(pipe, tmp_path / "samples", 3, prompts=["the dog"], num_inference_steps=2, guidance_scale=2.0)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3
    with pytest.raises(DataError, match="needs prompts"):
        sample_to_folder(pipe, tmp_path / "others", 3, num_inference_steps=2)


def test_samples_of_classes_and_texts_have_those_of_the_same_images(flow, image_folder):
    config = load_config(GeneratorConfig, flow, ["model.num_classes=3", "sampling.num_images=6"])
    options = sampling_options(config, open_cache(config))
    source = open_source(str(image_folder))
    assert options["prompt"] == [source.captions(i)[0] for i in range(6)]
    assert options["class_labels"] == [source.label(i) for i in range(6)] and len(set(options["class_labels"])) > 1


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.text_dim=9", "model.text_dim"),
        ("evaluation={every: 2, reference: x}", "evaluation.every"),
        ("model.text_dim=null", "model.num_classes=0"),
    ],
)
def test_lightningdit_of_other_texts_is_refused(flow, override, named):
    assert named in refusal("train_generator", flow, override)


def test_classes_are_learned_resumed_sampled_and_measured(codes, tmp_path):
    settings = yaml.safe_load(codes.read_text())
    settings["model"] |= {"text_dim": None, "num_classes": 3}
    codes.write_text(yaml.safe_dump(settings))
    evaluation = {"every": 6, "reference": str(tmp_path / "images"), "num_images": 3, "features": "efficientnet-lite0"}
    measured = [f"evaluation.{key}={value}" for key, value in evaluation.items()]
    whole = train_whole_and_in_parts("train_generator", tmp_path, codes, *measured, steps=6, first=4)
    lines = [json.loads(line) for line in (whole / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6] and (whole / "samples/step-0000006.png").exists()
    pipe = DiffusionPipeline.from_pretrained(whole / "final")
    assert type(pipe) is CATPipeline and pipe.text_encoder is None and len(pipe.labels) == 3
    sample_to_folder(pipe, tmp_path / "samples", 3, guidance_scale=2.0)
    with pytest.raises(DataError, match="takes no prompts"):
        sample_to_folder(pipe, tmp_path / "others", 3, prompts=["the dog"])
    assert "has 3 classes, the generator 2 (model.num_classes)" in refusal(
        "train_generator", codes, f"output={tmp_path / 'run'}", "model.num_classes=2"
    )


@pytest.mark.parametrize("kind", ["flow", "codes"])
def test_two_processes_train_together(kind, request, tmp_path):
    recipe = request.getfixturevalue(kind)
    assert train_in_processes(2, "train_generator", recipe, f"output={tmp_path / 'run'}", "train.steps=2") == [0, 0]
    assert (tmp_path / "run/final/model_index.json").exists()


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.codebook_size=16", "model.codebook_size = 32, this one has 16"),
        ("data.text_embeddings=NOWHERE", "NOWHERE"),
        ("model.text_dim=5", "text embeddings of 8 numbers, the generator is built for 5"),
        ("model={name: CATTransformerModel, head: flow, latent_channels: 6}", "model.head = categorical"),
        ("data.text_encoder=no/such/folder", "no/such/folder"),
        ("data.normalization=global", "data.normalization"),
    ],
)
def test_what_does_not_fit_is_one_line(codes, tmp_path, override, named):
    assert named in refusal("train_generator", codes, f"output={tmp_path / 'run'}", override)


@pytest.mark.parametrize(
    "override, named",
    [
        ({"sample_size": 8}, r"model.sample_size, .* = \(4, 4\), this one has \(8, 8\)"),
        ({"num_quantizers": 2}, r"model.num_quantizers = \(4, 4\), this one has \(4, 4, 2\)"),
    ],
)
def test_shapes_that_do_not_fit(codes, override, named):
    config = load_config(GeneratorConfig, codes)
    dataset = open_latents(config.data.latents)
    with pytest.raises(ConfigError, match=named):
        check_tokens(CATTransformerModel(**TINY_CAT | override), dataset)


def test_codes_are_not_for_generators_of_classes(codes, tmp_path):
    settings = yaml.safe_load(codes.read_text())
    settings["model"] = {"name": "LightningDiTTransformer2DModel", **TINY_LIGHTNINGDIT}
    codes.write_text(yaml.safe_dump(settings))
    assert "CATTransformerModel" in refusal("train_generator", codes, f"output={tmp_path / 'run'}")


def test_an_encoder_that_takes_shorter_texts_than_were_embedded(codes, tmp_path):
    save_bert(tmp_path / "short", max_length=7)
    short = f"data.text_encoder={tmp_path / 'short'}"
    refused = refusal("train_generator", codes, f"output={tmp_path / 'run'}", short)
    assert "data.text_encoder: max_length of" in refused and "7, got 12" in refused


def test_another_tokenizer_than_that_of_the_cache(codes, tmp_path):
    torch.manual_seed(1)
    VQModelFA(**TINY_VQ).save_pretrained(tmp_path / "other")
    other = f"data.tokenizer={tmp_path / 'other'}"
    assert "another tokenizer" in refusal("train_generator", codes, f"output={tmp_path / 'run'}", other)
