"""LightningDiT and DiT, velocities and noise: one training script, pipelines that diffusers opens."""

import diffusers
import pytest
import torch
import yaml
from conftest import TINY_LIGHTNINGDIT, run, tiny_generator_recipe
from diffusers import DiffusionPipeline, DiTTransformer2DModel

from favae import LightningDiTTransformer2DModel
from favae.errors import ConfigError
from favae.eval.sampling import class_names
from favae.training.config import GeneratorConfig, load_config
from favae.training.objectives import GeneratorLossConfig, Objective

TINY_DIT = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 3,
}


class Recorder(torch.nn.Module):
    def __init__(self, channels: int = 6):
        super().__init__()
        self.channels, self.calls = channels, []

    def forward(self, hidden_states, timestep, class_labels, return_dict):
        self.calls.append((hidden_states, timestep, class_labels))
        return (torch.zeros(len(hidden_states), self.channels, 4, 4),)


def test_the_class_is_dropped_once_for_all_blocks_of_a_dit():
    transformer = DiTTransformer2DModel(**TINY_DIT)
    objective = Objective(GeneratorLossConfig(), transformer)
    assert objective.class_dropout == 0.1 and objective.null_class == 3
    recorder, labels = Recorder(), torch.ones(4000, dtype=torch.long)
    objective(recorder, torch.zeros(4000, 6, 4, 4), labels)
    _, times, seen = recorder.calls[0]
    assert 0.08 < (seen == 3).float().mean() < 0.12 and set(seen.tolist()) == {1, 3}
    assert times.min() + times.max() > 100 and times.max() <= 1000
    transformer.train()  # its own dropping is off: the same labels, the same output
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(64, 6, 4, 4), torch.full((64,), 500.0), torch.ones(64, dtype=torch.long)
    assert torch.equal(transformer(*inputs).sample, transformer(*inputs).sample)


def test_lightningdit_drops_its_labels_itself():
    objective = Objective(GeneratorLossConfig(), LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT))
    recorder = Recorder()
    objective(recorder, torch.zeros(500, 6, 4, 4), torch.ones(500, dtype=torch.long))
    _, times, seen = recorder.calls[0]
    assert (seen == 1).all() and times.min() > 0 and times.max() < 1


def test_diffusion_noises_as_the_scheduler():
    objective = Objective(GeneratorLossConfig(objective="ddpm"), DiTTransformer2DModel(**TINY_DIT, out_channels=12))
    recorder, data = Recorder(12), torch.full((256, 6, 4, 4), 3.0)
    total, terms = objective(recorder, data, torch.zeros(256, dtype=torch.long))
    noisy, timesteps, _ = recorder.calls[0]
    assert timesteps.dtype == torch.int64 and timesteps.min() >= 0 and 900 < timesteps.max() <= 999
    alpha = objective.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = (noisy - alpha.sqrt() * data) / (1 - alpha).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert float(terms["noise"]) == pytest.approx(float(noise.square().mean()), rel=1e-3)
    assert terms["variance"] > 0


@pytest.mark.parametrize("objective, out_channels", [("flow_matching", 6), ("ddpm", 12)])
def test_a_dit_trains_and_its_pipeline_opens(tiny_cache, objective, out_channels):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    model = {"name": "DiTTransformer2DModel", **TINY_DIT, "out_channels": out_channels}
    if objective == "ddpm":
        model["num_embeds_ada_norm"] = 1000
    settings = {**yaml.safe_load(recipe.read_text()), "model": model, "loss": {"objective": objective}}
    recipe.write_text(yaml.safe_dump(settings))
    for steps in (4, 6):  # the second resumes
        run("train_generator.py", recipe, f"output={tiny_cache / 'run'}", f"train.steps={steps}")
    assert (tiny_cache / "run/samples/step-0000006.png").exists()
    pipe = DiffusionPipeline.from_pretrained(tiny_cache / "run/final")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, DiTTransformer2DModel)
    images = pipe([0, 2], num_inference_steps=3, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    if objective == "ddpm":
        assert type(pipe) is diffusers.DiTPipeline and pipe.vae.config.latents_std is None
        assert pipe.get_label_ids(["class2"]) == [2]
        assert class_names(pipe) == ["class0", "class1", "class2"]  # of the 1,000 it could have
    else:
        assert type(pipe).__name__ == "LightningDiTPipeline" and pipe.vae.config.latents_std is not None


@pytest.mark.parametrize(
    "model, objective, message",
    [
        ({"name": "LightningDiTTransformer2DModel"}, "ddpm", "ddpm needs model.name=DiTTransformer2DModel"),
        ({"name": "LightningDiTTransformer2DModel"}, "x", "loss.objective must be flow_matching or ddpm"),
        (
            {"name": "DiTTransformer2DModel", "in_channels": 6, "out_channels": 12},
            "flow_matching",
            "model.out_channels must be 6 for loss.objective=flow_matching and model.in_channels=6, got 12",
        ),
        (
            {"name": "DiTTransformer2DModel", "num_embeds_ada_norm": 3},
            "ddpm",
            "num_embeds_ada_norm must be 1000, got 3",
        ),
    ],
)
def test_objectives_that_do_not_fit_are_named(tmp_path, model, objective, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": model, "loss": {"objective": objective}}))
    with pytest.raises(ConfigError, match=message):
        load_config(GeneratorConfig, recipe)


def test_muon_takes_the_matrices_and_compiled_blocks_train(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    options = ("train.optimizer=muon", "train.compile=true", "train.sample_every=0")
    for steps in (2, 4):  # the second resumes
        run("train_generator.py", recipe, f"output={tiny_cache / 'run'}", f"train.steps={steps}", *options)
    state = tiny_cache / "run/checkpoints/step-4"
    adamw, muon = (torch.load(state / name, weights_only=True) for name in ("optimizer.bin", "optimizer_1.bin"))
    assert {tuple(entry) for entry in muon["state"].values()} == {("momentum_buffer",)}
    assert all(entry["momentum_buffer"].ndim == 2 for entry in muon["state"].values())
    model = LightningDiTTransformer2DModel.from_pretrained(state / "transformer")
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert len(muon["state"]) == len(matrices)
    assert len(adamw["state"]) == len(list(model.parameters())) - len(matrices)
    assert (
        DiffusionPipeline.from_pretrained(tiny_cache / "run/final").transformer.blocks[0].modulation.weight.abs().sum()
        > 0
    )
