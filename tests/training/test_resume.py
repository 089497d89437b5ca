"""Trainings that are killed and run again, alone and in pairs."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import (
    kill_when,
    refusal,
    steps_trained,
    tiny_generator_recipe,
    tiny_tokenizer_recipe,
    train,
    train_in_processes,
    weights,
    write_images,
)

from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import load_tokenizer
from favae.data.sources import open_source


def logged_steps(output) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_killed_tokenizer_training_ends_with_the_same_weights(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    more = ["train.steps=20", "train.checkpoint_every=2", "train.gradient_accumulation_steps=2"]
    train("train_tokenizer", recipe, f"output={tmp_path / 'whole'}", *more)
    killed = tmp_path / "killed"
    kill_when(killed / "checkpoints/step-4", "train_tokenizer", recipe, f"output={killed}", *more)
    assert not (killed / "final").exists()
    (killed / "checkpoints/.writing-step-6").mkdir(exist_ok=True)  # as a kill in the middle of writing leaves it
    assert steps_trained("train_tokenizer", recipe, f"output={killed}", *more, "resume=auto") <= 16
    assert weights(tmp_path / "whole/final") == weights(killed / "final")
    last = "checkpoints/step-20"
    assert weights(tmp_path / "whole" / last) == weights(killed / last)
    assert set(weights(killed / last)) == {
        f"{name}/diffusion_pytorch_model.safetensors" for name in ("tokenizer", "ema", "discriminator")
    }
    assert logged_steps(killed) == list(range(1, 21))

    before = weights(killed)
    train("train_tokenizer", recipe, f"output={killed}", *more)  # a finished run has nothing left to do
    assert weights(killed) == before and logged_steps(killed) == list(range(1, 21))


def test_other_rates_hold_where_a_run_goes_on_elsewhere(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    more = ["train.checkpoint_every=2", "train.lr_warmup_steps=10", "train.lr_scheduler=constant_with_warmup"]
    train("train_tokenizer", recipe, f"output={tmp_path / 'first'}", *more, "train.steps=2")
    last = tmp_path / "first/checkpoints/step-2"
    more += [f"resume={last}", f"output={tmp_path / 'second'}", "train.learning_rate=1.0e-5", "train.betas=[0.5,0.6]"]
    train("train_tokenizer", recipe, *more, "train.steps=4")
    train("train_tokenizer", recipe, *more, "train.steps=6")  # which goes on from its own last checkpoint
    log = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [3, 4, 5, 6]
    assert [record["learning_rate"] for record in log] == pytest.approx([3e-6, 4e-6, 5e-6, 6e-6])
    states = torch.load(tmp_path / "second/checkpoints/step-6/optimizers-0.pt", weights_only=True)
    assert {group["betas"] for state in states for group in state["param_groups"]} == {(0.5, 0.6)}


def test_a_tokenizer_does_not_go_on_with_more_images(tmp_path):
    images = write_images(tmp_path / "images")
    words = (tiny_tokenizer_recipe(tmp_path, images), f"output={tmp_path / 'run'}", "train.checkpoint_every=1")
    train("train_tokenizer", *words, "train.steps=1")
    one = next(images.rglob("*.png"))
    shutil.copy(one, one.with_name("another.png"))
    assert "data with another images" in refusal("train_tokenizer", *words, "train.steps=2")
    branch = (*words[:1], f"output={tmp_path / 'branch'}", f"resume={tmp_path / 'run/checkpoints/step-1'}")
    train("train_tokenizer", *branch, "train.checkpoint_every=1", "train.steps=2")  # elsewhere, from that checkpoint
    one.unlink()
    words = (*branch, "train.checkpoint_every=1", "train.steps=3")
    assert "data with another images" in refusal("train_tokenizer", *words)  # from its own


def test_killed_generator_training_ends_with_the_same_weights(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = ["train.steps=20", "train.checkpoint_every=2"]
    train("train_generator", recipe, f"output={tiny_cache / 'whole'}", *more)
    killed = tiny_cache / "killed"
    kill_when(killed / "checkpoints/step-4", "train_generator", recipe, f"output={killed}", *more)
    assert steps_trained("train_generator", recipe, f"output={killed}", *more) <= 16
    assert weights(tiny_cache / "whole/final") == weights(killed / "final")


def test_a_run_does_not_go_on_with_latents_of_another_tokenizer(tiny_cache):
    """Which stand under the same paths. A cache that was written again is the same."""
    cache, source = tiny_cache / "cache", open_source(str(tiny_cache / "images"))
    words = (tiny_generator_recipe(tiny_cache, cache, tiny_cache / "tokenizer"), f"output={tiny_cache / 'run'}")
    train("train_generator", *words, "train.steps=2")
    tokenizer = load_tokenizer(str(tiny_cache / "tokenizer"))
    for bias in (0.0, 1.0):
        tokenizer.quant_conv.bias.data += bias
        tokenizer.save_pretrained(tiny_cache / "tokenizer")
        shutil.rmtree(cache)
        write_latent_cache(tokenizer, ImageDataset(source, 16), cache, shard_size=5)
        if not bias:
            train("train_generator", *words, "train.steps=4")
    before = weights(tiny_cache / "run")
    assert "another tokenizer; choose another output" in refusal("train_generator", *words)
    assert weights(tiny_cache / "run") == before
    elsewhere = (f"resume={tiny_cache / 'run/checkpoints/step-4'}", f"output={tiny_cache / 'elsewhere'}")
    train("train_generator", words[0], *elsewhere, "train.steps=5")


def test_a_generator_refuses_what_does_not_fit(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    other = tiny_tokenizer_recipe(tiny_cache, tiny_cache / "images")
    train("train_tokenizer", other, f"output={tiny_cache / 'other'}", "train.steps=1", "seed=5")
    for override, named in (
        (f"data.tokenizer={tiny_cache / 'other/final'}", "another tokenizer"),
        ("model.sample_size=8", "latents of shape (6, 4, 4), the generator is built for (6, 8, 8)"),
        ("model.num_classes=2", "has 3 classes, the generator 2"),
        (f"data.latents={tiny_cache}", "latent cache"),
        (f"data.tokenizer={tiny_cache}", "no autoencoder"),
    ):
        assert named in refusal("train_generator", recipe, f"output={tiny_cache / 'run'}", override)
    assert not (tiny_cache / "run").exists()


def test_two_processes_train_together_and_are_resumed_by_two(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    output, accumulate = f"output={tmp_path / 'run'}", "train.gradient_accumulation_steps=2"
    for steps in (4, 6):  # the second resumes
        assert train_in_processes(2, "train_tokenizer", recipe, output, f"train.steps={steps}", accumulate) == [0, 0]
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run/checkpoints/step-6/random-states-1.pt").exists()
    assert "written by 2 process(es)" in refusal("train_tokenizer", recipe, output, "train.steps=8", accumulate)


@pytest.mark.parametrize("script", ["train_tokenizer", "train_generator"])
def test_bfloat16_with_workers_and_gradient_checkpointing(script, tiny_cache):
    options = ("train.mixed_precision=bf16", "train.gradient_checkpointing=true", "train.num_workers=1")
    output = tiny_cache / "run"
    if script == "train_tokenizer":
        recipe, steps = tiny_tokenizer_recipe(tiny_cache, tiny_cache / "images"), 8
    else:
        recipe, steps = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer"), 6
    train(script, recipe, f"output={output}", *options)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1)) and records[-1]["skipped"] == 0
    for file in (output / "final").rglob("*.safetensors"):
        saved = safetensors.torch.load_file(file)
        assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in saved.values())
