"""The table of the STFT loss on gray glyphs: valid recipes, and what its pictures and powers are."""

import pytest
import torch

from experiments import stft
from experiments.rows import Task
from experiments.stft import VARIANTS, gray, high_power
from train_tokenizer import build_tokenizer


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FAVAE_GLYPHS", str(tmp_path))
    monkeypatch.setattr(stft, "fastest_precision", lambda: "no")
    task = Task(name, VARIANTS[name], seed=0, steps=20, runs=tmp_path, resolution=32, batch_size=32)
    config = stft.recipe(task)
    with torch.device("meta"):
        vae = build_tokenizer(config)
    assert vae.config.in_channels == 1 and config.loss.kl == 1e-6


def test_gray_is_luminance():
    images = torch.tensor([[255, 255, 255], [0, 255, 0]], dtype=torch.uint8).view(2, 3, 1, 1)
    torch.testing.assert_close(gray(images).flatten(), torch.tensor([1.0, 2 * 0.587 - 1]))


def test_high_power_is_that_of_fast_waves():
    x = torch.arange(32) / 32 * 2 * torch.pi
    slow, fast = (torch.sin(cycles * x).expand(1, 1, 32, 32) for cycles in (3, 11))
    assert high_power(slow) < 1e-6 < high_power(fast)
    assert high_power(2 * fast) == pytest.approx(4 * high_power(fast))
