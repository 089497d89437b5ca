"""A generator divided among two processes: the weights of a run that is not, whole in every file, and resumed."""

import pytest
import safetensors.torch
import torch
from conftest import kill_when, run, tiny_generator_recipe
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import favae  # noqa: F401  (makes its pipelines known to diffusers)
from favae.training import sharding
from favae.training.sharding import in_one_piece, load_whole, own_parts, shard


def test_sharded_training_is_the_same_training(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = [
        "train.steps=10",
        "train.sample_every=5",
        "train.learning_rate=0.01",
        "train.max_grad_norm=1",
        "train.gradient_accumulation_steps=2",
    ]
    run("train_generator.py", recipe, f"output={tiny_cache / 'whole'}", *more, processes=2)
    sharded = ("train_generator.py", recipe, f"output={tiny_cache / 'sharded'}", "train.shard=true", *more)
    kill_when(tiny_cache / "sharded/checkpoints/.writing-step-6", *sharded, processes=2)
    optimizers = list((tiny_cache / "sharded/checkpoints/step-4/generator-optimizer").glob("*.distcp"))
    assert len(optimizers) == 2  # a part of each process
    assert not (tiny_cache / "sharded/checkpoints/step-6").exists()
    run(*sharded, processes=2)
    file = "transformer/diffusion_pytorch_model.safetensors"
    expected, found = (safetensors.torch.load_file(tiny_cache / name / "final" / file) for name in ("whole", "sharded"))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    config = (tiny_cache / "sharded/final/transformer/config.json").read_text()
    assert '"_class_name": "LightningDiTTransformer2DModel"' in config
    assert len(DiffusionPipeline.from_pretrained(tiny_cache / "sharded/final")([0, 1]).images) == 2
    assert (tiny_cache / "sharded/samples/step-0000005.png").exists()


def test_a_run_without_shards_is_no_beginning_for_one_with(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    run("train_generator.py", recipe, f"output={tiny_cache / 'whole'}", "train.steps=2", processes=2)
    checkpoint, output = tiny_cache / "whole/checkpoints/step-2", tiny_cache / "sharded"
    more = (f"resume={checkpoint}", f"output={output}", "train.shard=true")
    result = run("train_generator.py", recipe, *more, processes=2, check=False)
    assert result.returncode and "does not fit these settings (no generator-optimizer" in result.stderr


def test_weights_of_another_model_are_refused():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="not those of this Linear"):
        load_whole(model, nn.Linear(1, 2).state_dict())  # which copying would spread
    with pytest.raises(ValueError, match="not those of this Linear"):
        load_whole(model, {**model.state_dict(), "more": torch.zeros(1)})


def test_a_full_disk_is_what_it_is(monkeypatch, tmp_path):
    def save(*arguments, **options):
        raise CheckpointException("write", {1: (OSError(28, "No space left on device"), None)})

    monkeypatch.setattr(sharding.distributed_checkpoint, "save", save)
    model = nn.Linear(2, 2)
    with pytest.raises(OSError, match="No space left"):
        sharding.save_optimizers(model, torch.optim.AdamW(model.parameters()), tmp_path)


def test_one_process_keeps_its_model():
    model = nn.Sequential(nn.Linear(2, 2))
    shard(model, [model[0]])
    assert in_one_piece(model) is model and own_parts(model) == list(model.parameters())
