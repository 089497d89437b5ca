"""What the generators' experiments measure, and that their recipes are valid."""

import numpy as np
import pytest
import torch

from experiments import emoji as emoji_module
from experiments import generator_quality, text_to_image
from experiments.emoji import Emoji, retrieval, retrieval_rates
from experiments.glyph_texts import fastest_on_cpu
from experiments.image_sets import InMemoryImages, read_images
from experiments.rows import Task
from favae.training.config import load_config
from favae.training.tokenizer_config import TokenizerConfig


def test_images_in_memory():
    images = torch.randint(256, (3, 3, 8, 6), dtype=torch.uint8)
    dataset = InMemoryImages(images)
    assert dataset.size == (8, 6) and torch.equal(read_images(dataset), images)


def make_task(name, variant, folder, steps=8):
    return Task(name=name, variant=variant, seed=1, steps=steps, runs=folder, resolution=64, batch_size=4)


def test_times_of_gpus_are_not_compared_with_those_of_cpus():
    rows = [
        {"seconds_per_image": seconds, "hardware": {"gpu": gpu}} for seconds, gpu in ((3, None), (2, None), (1, "H"))
    ]
    assert fastest_on_cpu(rows, 1) == "2.0"
    assert fastest_on_cpu(rows[2:], 1) == ""


@pytest.mark.parametrize("name", generator_quality.VARIANTS)
def test_recipes_of_generator_quality(tmp_path, name):
    task = make_task(name, generator_quality.VARIANTS[name], tmp_path)
    config = generator_quality.generator_config(task, tmp_path / "latents", tmp_path / "tokenizer")
    assert config.seed == 1 and config.train.steps == 8 and config.train.checkpoint_every == 2
    assert config.data.latents == str(tmp_path / "latents")


@pytest.mark.parametrize("name", text_to_image.VARIANTS)
def test_recipes_of_text_to_image(tmp_path, name):
    task = make_task(name, text_to_image.VARIANTS[name], tmp_path)
    config = text_to_image.generator_config(task, tmp_path / "tokenizer", tmp_path / "cache")
    assert config.train.steps == 8
    tokens = text_to_image.TOKEN_TYPES[task.variant.tokens]
    recipe = text_to_image.ROOT / f"configs/tokenizer/{tokens.tokenizer}.yaml"
    load_config(TokenizerConfig, recipe, [f"model.{key}={value}" for key, value in tokens.tokenizer_changes.items()])


def test_images_are_retrieved_by_name_and_category(monkeypatch):
    names = [["red apple", "apple"], ["tomato", "red apple"], ["cat"], ["green apple"], ["black cat"]]
    categories = ["food", "food", "animal", "food", "animal"]
    emoji = Emoji(torch.zeros(5, 3, 64, 64), names, categories, num_training=3)
    real = np.eye(5, dtype=np.float32)
    prompted = [3, 4, 3, 4]  # the third sample looks like the cat, all others like what they should
    features = real[[3, 4, 2, 4]] + 0.5 * real[[0, 2, 1, 3]]
    monkeypatch.setattr(emoji_module, "TOP", (1, 2))
    found = retrieval_rates(features, prompted, emoji, real)
    assert found["name"] == {"top1": 0.75, "top2": 0.75} and found["chance"]["name"]["top1"] == pytest.approx(0.2)
    assert found["category"] == {"top1": 0.75, "top2": 1.0}
    assert found["chance"]["category"]["top1"] == pytest.approx((3 / 5 + 2 / 5) / 2)
    assert found["among_heldout"]["top1"] >= 0.75 and found["chance"]["among_heldout"]["top1"] == pytest.approx(0.5)
    of_training = retrieval_rates(real[:1], [0], emoji, real)
    assert of_training["chance"]["name"]["top1"] == pytest.approx(0.4)  # two emoji have the name
    assert "among_heldout" not in of_training


def test_retrieval_counts_what_is_near_and_what_chance_gives():
    angles = np.deg2rad([0, 10, 20, 90, 100])
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [5], [0.1], [2], [1]]  # lengths do not count
    samples = np.deg2rad([1, 91])
    samples = np.stack([np.cos(samples), np.sin(samples)], axis=1)
    relevant = np.zeros((2, 5), bool)
    relevant[0, 0] = relevant[1, [2, 4]] = True  # the nearest; the second nearest
    rates, chance = retrieval(samples, gallery, relevant, top=(1, 2, 5))
    assert rates == {1: 0.5, 2: 1.0, 5: 1.0}
    assert chance == pytest.approx({1: (1 / 5 + 2 / 5) / 2, 2: (2 / 5 + (1 - 3 / 10)) / 2, 5: 1.0})
    nothing, without = retrieval(samples, gallery, np.zeros((2, 5), bool))
    assert nothing == without == {1: 0.0, 5: 0.0}
    with pytest.raises(ValueError):
        retrieval(samples, gallery, relevant.T)


def test_retrieval_at_random_is_chance():
    rng = np.random.default_rng(0)
    samples, gallery = rng.normal(size=(2000, 8)), rng.normal(size=(40, 8))
    rates, chance = retrieval(samples, gallery, rng.random((2000, 40)) < 0.1)
    assert all(rates[k] == pytest.approx(chance[k], abs=0.03) for k in (1, 5)) and chance[1] == pytest.approx(
        0.1, abs=0.01
    )
