"""The experiments on glyphs: what their models cost, and a row of each from training to measures."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from experiments import codebooks, glyph_texts, glyphs, latents
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
    monkeypatch.setenv("FAVAE_GLYPHS", str(tmp_path))
    monkeypatch.setattr(glyphs, "WEIGHTS", tmp_path / "classifier.safetensors")
    monkeypatch.setattr(latents, "fastest_precision", lambda: "no")
    results = (glyphs.load_glyphs, glyphs.trained_classifier, latents.reference)
    for cached in results:
        cached.cache_clear()
    yield tmp_path
    for cached in results:
        cached.cache_clear()


def task_of(name: str, folder, steps: int = 20) -> Task:
    pictures = folder / "pictures"
    return Task(name, VARIANTS[name], seed=0, steps=steps, runs=folder, resolution=32, batch_size=32, pictures=pictures)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_is_valid(name, small):
    config = tokenizer_config(task_of(name, small))
    with torch.device("meta"):
        build_tokenizer(config)
    assert config.train.steps == 20 and config.train.checkpoint_every == 5


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


def test_a_row_has_all_measures(small, monkeypatch):
    model = GlyphClassifier()
    monkeypatch.setattr(glyphs, "trained_classifier", lambda: model)
    monkeypatch.setattr(latents, "trained_classifier", lambda: model)
    monkeypatch.setattr(latents, "SAMPLES_PER_CLASS", 1)
    monkeypatch.setattr(latents, "PICTURED", 1)
    monkeypatch.setattr(latents, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(latents, "POINTS", (0.5, 1.0))
    monkeypatch.setitem(latents.TOKENIZER, "batch_size", 4)
    monkeypatch.setitem(latents.GENERATOR, "batch_size", 4)
    row = latents.make_row(task_of("smooth_first", small))
    assert row["f"] == 8 and row["floats_per_image"] == 256 and [point["steps"] for point in row["curve"]] == [10, 20]
    assert row["recon"] == row["curve"][-1]["recon"] and row["seams"] > 0
    assert row["latents"]["SEC 1/4"] > 0 and row["reconstructions"]["fd"] > 0
    generator = row["generator"]
    assert 0 <= generator["unguided"]["accuracy"] <= 1 and generator["guided"]["fd"] > 0
    assert [point["steps"] for point in generator["curve"]] == [10, 20]
    assert (small / "pictures/smooth_first-guided.png").exists()
    assert not list(small.glob("*latents")) and not list(small.glob("*smooth"))
    report = {"rows": [row], "real": row["reconstructions"]}
    assert "`smooth_first` | 1 | 8" in latents.tables(report)


def test_plateaus():
    assert on_plateau([1.0, 0.5, 0.4, 0.398]) and not on_plateau([1.0, 0.5, 0.4, 0.39])


@pytest.mark.parametrize("name", codebooks.VARIANTS)
def test_the_recipes_of_codebooks(name, small, monkeypatch):
    monkeypatch.setattr(codebooks, "fastest_precision", lambda: "no")
    task = Task(name, codebooks.VARIANTS[name], seed=0, steps=20, runs=small, resolution=32, batch_size=32)
    with torch.device("meta"):
        vae = build_tokenizer(codebooks.recipe(task))
    assert vae.config.frequency_complement == codebooks.VARIANTS[name].complement


def test_a_row_of_codebooks(small, monkeypatch):
    model = GlyphClassifier()
    monkeypatch.setattr(codebooks, "fastest_precision", lambda: "no")
    monkeypatch.setattr(glyphs, "trained_classifier", lambda: model)
    monkeypatch.setattr(latents, "trained_classifier", lambda: model)
    monkeypatch.setattr(codebooks, "POINTS", (0.5, 1.0))
    monkeypatch.setattr(latents, "POINTS", (0.5, 1.0))
    monkeypatch.setitem(codebooks.TRAIN, "batch_size", 4)
    task = Task("dsl", codebooks.VARIANTS["dsl"], seed=0, steps=20, runs=small, resolution=32, batch_size=32)
    row = codebooks.make_row(task)
    assert row["bits_per_image"] == 16 * 8 and 0 < row["codebook_usage"] <= 1 and row["fd"] > 0
    assert [point["steps"] for point in row["curve"]] == [10, 20]
    assert "`dsl` | 1" in codebooks.tables({"rows": [row]})


def test_a_row_of_glyph_texts(small, monkeypatch):
    model = GlyphClassifier()
    for module in (glyphs, latents, glyph_texts):
        monkeypatch.setattr(module, "trained_classifier", lambda: model)
    for module in (codebooks, glyph_texts):
        monkeypatch.setattr(module, "fastest_precision", lambda: "no")
    monkeypatch.setattr(glyph_texts, "PROMPTS", 5)
    monkeypatch.setattr(glyph_texts, "SPLITS", {"heldout": "texts"})
    monkeypatch.setattr(glyph_texts, "GUIDANCE_SCALES", (2.0,))
    monkeypatch.setattr(codebooks, "STEPS", 20)
    monkeypatch.setitem(codebooks.TRAIN, "batch_size", 4)
    monkeypatch.setitem(glyph_texts.TRAIN, "batch_size", 4)
    task = Task("mean", glyph_texts.VARIANTS["mean"], seed=0, steps=20, runs=small, resolution=32, batch_size=64)
    row = glyph_texts.make_row(task)
    assert set(row["heldout"][0]["attributes"]) == set(ATTRIBUTES) and row["heldout"][0]["fd"] > 0
    report = {"rows": [row]}
    assert "| `mean` | 1 | texts | 2.0 |" in glyph_texts.tables(report)
