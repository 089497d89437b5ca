"""The experiments on glyphs: what their models cost, and a row of each from training to measures."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from experiments import codebooks, generators, glyph_texts, glyphs, guidance, latents, samplers, training_sets
from experiments.glyphs import ATTRIBUTES, CHARACTERS, GlyphClassifier, GlyphExtractor, accuracies
from experiments.latents import VARIANTS, on_plateau, tokenizer_config
from experiments.rows import Task
from favae.autoencoders import measure_budget
from favae.training.models import build_model
from train_tokenizer import build_tokenizer


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Pictures of noise with each character once, and a classifier with random weights."""
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for split in ("train", "validation", "heldout"):
        pictures = [
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2 * len(CHARACTERS))
        ]
        columns = {name: [values[i % len(values)] for i in range(len(pictures))] for name, values in ATTRIBUTES.items()}
        captions = [f"{color} {label}" for color, label in zip(columns["color"], columns["label"])]
        table = datasets.Dataset.from_dict({"image": pictures, "caption": captions, **columns})
        table.cast_column("label", datasets.ClassLabel(names=list(CHARACTERS))).to_parquet(
            tmp_path / f"{split}.parquet"
        )
        few = [picture.resize((64, 64)) for picture in pictures[:6]]
        datasets.Dataset.from_dict({"image": few}).to_parquet(tmp_path / f"photographs/{split}.parquet")
    monkeypatch.setenv("FAVAE_GLYPHS", str(tmp_path))
    monkeypatch.setenv("FAVAE_PHOTOGRAPHS", str(tmp_path / "photographs"))
    monkeypatch.setattr(glyphs, "WEIGHTS", tmp_path / "classifier.safetensors")
    for module in (latents, codebooks):
        monkeypatch.setattr(module, "fastest_precision", lambda: "no")
    for settings in (latents.TOKENIZER, latents.GENERATOR, codebooks.TRAIN, glyph_texts.TRAIN):
        monkeypatch.setitem(settings, "compile", False)
        monkeypatch.setitem(settings, "optimizer", "adamw")
    for settings in (codebooks.TRAIN, glyph_texts.TRAIN):
        monkeypatch.setitem(settings, "batch_size", 4)
    monkeypatch.setattr(latents, "POINTS", (0.5, 1.0))
    monkeypatch.setattr(latents, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(glyph_texts, "PICTURED", 2)
    results = (glyphs.load_glyphs, glyphs.trained_classifier, training_sets.load_images, training_sets.reference)
    for cached in results:
        cached.cache_clear()
    yield tmp_path
    for cached in results:
        cached.cache_clear()


@pytest.fixture
def classifier(small):
    save_file(GlyphClassifier().state_dict(), glyphs.WEIGHTS)


def task_of(name: str, folder, steps: int = 20) -> Task:
    pictures = folder / "pictures"
    return Task(name, VARIANTS[name], seed=0, steps=steps, runs=folder, resolution=32, batch_size=32, pictures=pictures)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_is_valid(name, small):
    config = tokenizer_config(task_of(name, small))
    with torch.device("meta"):
        build_tokenizer(config)
    assert config.train.steps == 20 and config.train.checkpoint_every == 10


def test_budgets_are_equal():
    budgets = {name: measure_budget(build_model(variant.model), 32) for name, variant in VARIANTS.items()}
    assert {budget.floats_per_image for budget in budgets.values()} == {256}
    for name, budget in budgets.items():
        reference = budgets["stock_f4" if name.endswith("f4") else "stock"]
        limit = 1.45 if name == "stock_wide" else 1.06
        assert budget.flops / reference.flops < limit, name


def test_the_classifier_is_trained_and_reads_glyphs(small, monkeypatch):
    monkeypatch.setattr(glyphs, "WIDTHS", (8, 8, 16, 16))
    monkeypatch.setattr(glyphs, "BATCH_SIZE", 32)
    glyphs.main(["--steps", "60"])
    assert (small / "classifier.json").exists()
    images, attributes = glyphs.load_glyphs("train")
    found = accuracies(glyphs.trained_classifier(), images, attributes)
    assert set(found) == set(ATTRIBUTES) and found["size"] > 0.8  # noise is learned by heart
    extractor = GlyphExtractor()
    features = extractor(images[:5])
    assert features["features"].shape == (5, 192) and features["logits"].shape == (5, 47)
    assert extractor.metric("FID") == "FD(glyphs)"


@pytest.mark.parametrize("name", ["smooth_first", "photographs_ours"])
def test_a_row_has_all_measures(name, small, classifier, monkeypatch):
    monkeypatch.setattr(latents, "PICTURED", 1)
    task = task_of(name, small)
    classes = task.variant.images.num_classes
    fewer = replace(task.variant.images, batch_sizes=(4, 4), samples=max(6, classes))
    row = latents.make_row(replace(task, variant=replace(task.variant, images=fewer)))
    assert row["f"] == 8 and row["floats_per_image"] == (fewer.size // 8) ** 2 * 16
    assert [point["steps"] for point in row["curve"]] == [10, 20]
    assert row["recon"] == row["curve"][-1]["recon"] and row["seams"] > 0
    assert row["latents"]["SEC 1/4"] > 0 and row["reconstructions"]["fd"] > 0
    generator = row["generator"]
    assert generator["unguided"]["fd"] > 0 and set(generator["curve"][0]) >= {"steps", "unguided"}
    if classes > 1:
        assert 0 <= generator["unguided"]["accuracy"] <= 1 and generator["guided"]["fd"] > 0
    assert [point["steps"] for point in generator["curve"]] == [10, 20]
    assert (small / f"pictures/{name}.png").exists()
    assert not list(small.glob("*latents")) and not list(small.glob("*smooth"))
    report = {"rows": [row], "real": {str(fewer): row["reconstructions"]}}
    assert f"| `{name}` | 1 |" in latents.COMPARISON.tables(report)

    if classes > 1:  # other solvers sample the same generator
        generator = task.beside("-generator")
        monkeypatch.setattr(latents, "trained_generator", lambda task, name, seed: generator)
        monkeypatch.setattr(samplers, "GLYPHS", fewer)
        monkeypatch.setattr(samplers, "EVALUATIONS", (2,))
        row = samplers.make_row(replace(task, name="sde", variant=samplers.VARIANTS["sde"]))
        assert row["curve"][0]["evaluations"] == 2 and "| `sde` | 1 |" in samplers.tables({"rows": [row]})
        monkeypatch.setattr(guidance, "GLYPHS", fewer)
        monkeypatch.setattr(guidance, "SCALES", (1.5,))
        row = guidance.make_row(replace(task, name="stock"))
        assert row["scales"][0]["fd"] > 0 and "| `stock` | 1 | 1.5 |" in guidance.tables({"rows": [row]})


def test_plateaus():
    assert on_plateau([1.0, 0.5, 0.4, 0.398]) and not on_plateau([1.0, 0.5, 0.4, 0.39])


@pytest.mark.parametrize("name", codebooks.VARIANTS)
def test_the_recipes_of_codebooks(name, small):
    task = Task(name, codebooks.VARIANTS[name], seed=0, steps=20, runs=small, resolution=32, batch_size=32)
    with torch.device("meta"):
        vae = build_tokenizer(codebooks.recipe(task))
    assert vae.config.frequency_complement == codebooks.VARIANTS[name].complement


def test_a_row_of_codebooks(small, classifier):
    task = Task("dsl", codebooks.VARIANTS["dsl"], seed=0, steps=20, runs=small, resolution=32, batch_size=32)
    row = codebooks.make_row(task)
    assert row["bits_per_image"] == 16 * 8 and 0 < row["codebook_usage"] <= 1 and row["fd"] > 0
    assert [point["steps"] for point in row["curve"]] == [10, 20]
    assert "`dsl` | 1" in codebooks.tables({"rows": [row]})


def test_a_row_of_glyph_texts(small, classifier, monkeypatch):
    monkeypatch.setattr(glyph_texts, "PROMPTS", 5)
    monkeypatch.setattr(glyph_texts, "SPLITS", {"heldout": "texts"})
    monkeypatch.setattr(glyph_texts, "GUIDANCE_SCALES", (2.0,))
    for module in (codebooks, latents, glyph_texts):
        monkeypatch.setattr(module, "STEPS", 20)
    runs = small / "glyph_texts"
    runs.mkdir()
    task = Task("tokens", glyph_texts.VARIANTS["tokens"], seed=0, steps=20, runs=runs, resolution=32, batch_size=64)
    row = glyph_texts.make_row(task)
    assert (small / "codebooks/dsl-0-20/final").exists()
    assert set(row["heldout"][0]["attributes"]) == set(ATTRIBUTES) and row["heldout"][0]["fd"] > 0
    report = {"rows": [row]}
    assert "| `tokens` | 1 | texts | 2.0 |" in glyph_texts.tables(report)


def test_a_row_of_generators(small, classifier, monkeypatch):
    AcceleratorState._reset_state()  # as a new process would find it
    monkeypatch.setattr(latents, "fastest_precision", lambda: "bf16")  # the generator learns in float32
    for module in (codebooks, latents, generators):
        monkeypatch.setattr(module, "STEPS", 20)
    fewer = replace(training_sets.GLYPHS, batch_sizes=(4, 4), samples=94)
    monkeypatch.setitem(VARIANTS, "stock", replace(VARIANTS["stock"], images=fewer))
    variant = replace(generators.VARIANTS["unet"], images=fewer)
    runs = small / "generators"
    runs.mkdir()
    row = generators.make_row(replace(task_of("stock", small), name="unet", variant=variant, runs=runs))
    assert [sampled["guidance_scale"] for sampled in row["samples"]] == [1.0, 2.0]
    assert row["samples"][0]["fd"] > 0 and 0 <= row["samples"][1]["accuracy"] <= 1 and row["samples"][1]["seams"] > 0
    assert (small / "pictures/unet.png").exists()
    assert "| `unet` | 1 | 4." in generators.tables({"rows": [row]})


def test_generators_have_about_as_many_parameters():
    parts = {name: build_model(variant.model).num_parameters() for name, variant in generators.VARIANTS.items()}
    assert max(parts.values()) < 1.05 * min(parts.values())
    sizes = {name: build_model(variant.model).num_parameters() for name, variant in glyph_texts.VARIANTS.items()}
    assert sizes["lightningdit"] == pytest.approx(sizes["tokens_flow"], rel=0.05)
