"""The decoders of experiments/real_latents.py: what they cost, and one row from training to measures."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from experiments import real_latents, zoo
from experiments.real_latents import OWN, VARIANTS
from experiments.rows import Task
from favae import AutoencoderTinyFA
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig


def gflop(name: str) -> float:
    settings = {"name": "AutoencoderTinyFA", "latent_channels": 32, "latent_pooling": True}
    with torch.device("meta"):
        return real_latents.cost(build_model(settings | VARIANTS[name].model))["gflop"]


def test_controls_have_the_flops_of_what_they_are_compared_with():
    whole = gflop("teacher")
    for levels, share in ((1, 0.5), (2, 0.2)):
        assert gflop(f"wavelet_{levels}") < share * whole
        for control in (f"shuffle_{levels}", f"plain_{levels}"):
            assert gflop(control) == pytest.approx(gflop(f"wavelet_{levels}"), rel=0.02)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A teacher with random weights, and photographs of noise."""
    teacher = AutoencoderTinyFA(latent_channels=32, latent_pooling=True, **OWN)
    teacher.decoder.layers[-1].reset_parameters()
    teacher.save_pretrained(tmp_path / "teacher")
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "heldout"):
        pictures = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(4)]
        datasets.Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setattr(real_latents, "teacher_folder", lambda: tmp_path / "teacher")
    monkeypatch.setenv("FAVAE_PHOTOGRAPHS", str(tmp_path))
    monkeypatch.setattr(real_latents, "fastest_precision", lambda: "no")
    monkeypatch.setattr(real_latents, "VALIDATION_CROPS", 2)
    monkeypatch.setattr(real_latents, "PICTURES", (0, 1))
    monkeypatch.setitem(real_latents.TRAIN, "lr_warmup_steps", 0)  # one step is enough to see something
    return tmp_path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_is_valid(name, files):
    task = Task(name=name, variant=VARIANTS[name], seed=0, steps=3, runs=files, resolution=64, batch_size=2)
    (files / "recipe.yaml").write_text(yaml.safe_dump(task.variant.recipe(task)))
    config = load_config(TokenizerConfig, files / "recipe.yaml")
    assert config.train.parts == "decoder" and config.teacher.autoencoder == str(files / "teacher")


def test_a_row(files):
    common = {"seed": 0, "steps": 2, "runs": files, "resolution": 64, "batch_size": 2, "pictures": files / "pictures"}
    row = real_latents.make_row(Task(name="wavelet_2", variant=VARIANTS["wavelet_2"], **common))
    measures = ("psnr", "recon", "low", "high", "ssim", "fd", "seams", "validation_psnr", "gflop", "params")
    assert {name: row[name] for name in measures if not np.isfinite(row[name])} == {}
    assert row["curve"][-1][0] == 2
    assert (files / "pictures/wavelet_2.png").exists() and (files / "pictures/original.png").exists()
    report = {"rows": [row]}
    real_latents.finish(report, files / "report")
    assert row["images_per_second"] > 0 and "`wavelet_2`" in real_latents.tables(report)


def test_a_row_that_goes_on_from_another_trains_that_first(files, monkeypatch):
    trained = []

    def train(config):
        trained.append((Path(config.output).name, config.train.steps, config.model.get("from_pretrained")))
        build_model({key: value for key, value in config.model.items() if key != "from_pretrained"}).save_pretrained(
            f"{config.output}/final"
        )

    monkeypatch.setattr(real_latents, "train", train)
    common = {"seed": 0, "runs": files, "resolution": 64, "batch_size": 2}
    after = Task(name="wavelet_2_longer", variant=VARIANTS["wavelet_2_longer"], steps=4, **common)
    how = real_latents.train_once(after)
    before = str(files / "wavelet_2_long-0-10/final")
    assert trained == [("wavelet_2_long-0-10", 10, trained[0][2]), ("wavelet_2_longer-0-4", 4, before)]
    assert real_latents.train_once(after) == how and how["training_crops"] > 0
    assert len(trained) == 2  # by whichever process


@torch.no_grad()
def test_the_zoo_s_model_is_small_and_described(files, monkeypatch):
    recipe = load_config(TokenizerConfig, ROOT / "configs/tokenizer/flux2_wavelet_tiny.yaml")
    (files / "run").mkdir()
    build_model(recipe.model).save_pretrained(files / "run/final")
    (files / "run/metrics.jsonl").write_text('{"step": 7}\n')
    (files / "run/config.yaml").write_text("model: {}\n")
    (files / "costs.json").write_text('{"results": {"flux2 stock": {"gflop": 622.0}}}')
    monkeypatch.setattr(zoo, "COSTS", files / "costs.json")
    places = ["--output", str(files / "zoo"), "--results", str(files / "zoo.json")]
    zoo.main(["--run", str(files / "run"), *places])
    weights = files / "zoo/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 4e6
    card = (files / "zoo/README.md").read_text()
    assert "7 steps" in card and "622" in card and "| TAEF2 |" in card and "latent_channels: 32" in card
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    assert len(json.loads((files / "zoo.json").read_text())["rows"]) == 4
