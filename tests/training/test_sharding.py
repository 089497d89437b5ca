"""Trainings divided among two processes: the weights of a run that is not, whole in every file, and resumed."""

import pytest
import safetensors.torch
import torch
from conftest import kill_when, make_tiny_kl, tiny_generator_recipe, tiny_tokenizer_recipe, train_in_processes
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from torch import distributed, nn

from favae.training.sharding import (
    blocks_of,
    gather_full_model,
    is_sharded,
    load_full_state,
    local_shards,
    save_full_state,
    shard,
)


def assert_close_weights(first, second) -> None:
    expected, found = (safetensors.torch.load_file(file) for file in (first, second))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_sharded_generator_is_the_same_generator(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = [
        "train.steps=10",
        "train.sample_every=5",
        "train.learning_rate=0.01",
        "train.max_grad_norm=1",
        "train.gradient_accumulation_steps=2",
        "loss.alignment={weight: 0.5, layer: 1, backbone: efficientnet-lite0, stop_step: 6}",
        f"data.images={tiny_cache / 'images'}",
    ]
    assert train_in_processes(2, "train_generator", recipe, f"output={tiny_cache / 'whole'}", *more) == [0, 0]
    sharded = ("train_generator", recipe, f"output={tiny_cache / 'sharded'}", "train.shard=true", *more)
    kill_when(tiny_cache / "sharded/checkpoints/.writing-step-6", *sharded, processes=2)
    optimizers = list((tiny_cache / "sharded/checkpoints/step-4").glob("optimizers-*.pt"))
    assert len(optimizers) == 2  # a share of each process
    assert not (tiny_cache / "sharded/checkpoints/step-6").exists()
    assert train_in_processes(2, *sharded) == [0, 0]
    file = "final/transformer/diffusion_pytorch_model.safetensors"
    assert_close_weights(tiny_cache / "whole" / file, tiny_cache / "sharded" / file)
    config = (tiny_cache / "sharded/final/transformer/config.json").read_text()
    assert '"_class_name": "LightningDiTTransformer2DModel"' in config
    assert len(DiffusionPipeline.from_pretrained(tiny_cache / "sharded/final")([0, 1]).images) == 2
    assert (tiny_cache / "sharded/samples/step-0000005.png").exists()

    # A run without shards has no share of the optimizer for each process.
    more = (f"resume={tiny_cache / 'whole/checkpoints/step-10'}", f"output={tiny_cache / 'other'}", "train.shard=true")
    codes = train_in_processes(2, "train_generator", recipe, *more)
    assert all("was written with train.shard=false" in str(code) for code in codes)


def test_a_sharded_tokenizer_is_the_same_tokenizer(tmp_path, image_folder):
    recipe = tiny_tokenizer_recipe(tmp_path, image_folder)
    more = ["train.steps=6", "train.lr_warmup_steps=0", "train.max_grad_norm=1", "loss.adversarial.start_step=2"]
    more += ["loss.alignment={weight: 0.1, backbone: efficientnet-lite0, adaptive: false}"]
    more += ["loss.adversarial.adaptive=false"]
    for output, shard_ in (("whole", "train.shard=false"), ("sharded", "train.shard=true")):
        words = (recipe, f"output={tmp_path / output}", shard_, *more)
        assert train_in_processes(2, "train_tokenizer", *words) == [0, 0]
    file = "final/diffusion_pytorch_model.safetensors"
    assert_close_weights(tmp_path / "whole" / file, tmp_path / "sharded" / file)
    assert (tmp_path / "sharded/samples/step-0000004.png").exists()


def test_weights_of_another_module_are_refused(tmp_path):
    save_full_state(nn.Linear(1, 2), tmp_path / "other")
    save_full_state(nn.Sequential(nn.Linear(4, 2)), tmp_path / "names")
    for name in ("other", "names"):
        with pytest.raises(RuntimeError):
            load_full_state(nn.Linear(4, 2), tmp_path / name)


def test_one_process_keeps_its_model_unless_a_launcher_started_it(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    shard(model, [model[0]])
    assert gather_full_model(model) is model and local_shards(model) == list(model.parameters())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        shard(model, [model[0]])
        assert is_sharded(model)
        # A DiT reads its first block again after all blocks: train_generator.py shards that with the rest.
        dit = DiTTransformer2DModel(
            2, 4, in_channels=2, num_layers=2, patch_size=1, sample_size=2, num_embeds_ada_norm=3
        )
        inputs = torch.rand(1, 2, 2, 2), torch.ones(1), torch.ones(1, dtype=torch.long)
        expected = dit.eval()(*inputs).sample
        shard(dit, blocks_of(dit)[1:])
        torch.testing.assert_close(dit(*inputs).sample, expected)
        # Statistics of latents are registered after the model is made.
        vae = make_tiny_kl()
        vae.register_to_config(latents_mean=[1.0] * 6, latents_std=[2.0] * 6)
        shard(vae, [])
        whole = gather_full_model(vae)
        assert whole.config.latents_mean == [1.0] * 6 and whole.config.latents_std == [2.0] * 6
    finally:
        distributed.destroy_process_group()
