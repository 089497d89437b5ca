"""The table of the STFT loss on gray glyphs has valid recipes."""

import pytest
import torch

from experiments import stft
from experiments.rows import Task
from experiments.stft import VARIANTS
from train_tokenizer import build_tokenizer


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FAVAE_GLYPHS", str(tmp_path))
    (tmp_path / "train.parquet").touch()
    monkeypatch.setattr(stft, "fastest_precision", lambda: "no")
    task = Task(name, VARIANTS[name], seed=0, steps=20, runs=tmp_path, resolution=32, batch_size=32)
    config = stft.recipe(task)
    with torch.device("meta"):
        vae = build_tokenizer(config)
    assert vae.config.in_channels == 1 and config.loss.kl == 1e-6
