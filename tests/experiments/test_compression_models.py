"""The comparison of compression models: its recipes, one row from training to files, and rates made equal."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from experiments import compression
from experiments.compression import FEATURES, VARIANTS, at_equal_bits
from experiments.rows import Task
from train_tokenizer import build_tokenizer

pytest.importorskip("constriction", reason="the extra [compression] is not installed")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Photographs of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "heldout"):
        pictures = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(4)]
        datasets.Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setenv("FAVAE_PHOTOGRAPHS", str(tmp_path))
    monkeypatch.setattr(compression, "fastest_precision", lambda: "no")
    return tmp_path


def task_of(name: str, folder, steps: int = 6) -> Task:
    pictures = folder / "pictures"
    return Task(name, VARIANTS[name], seed=0, steps=steps, runs=folder, resolution=64, batch_size=8, pictures=pictures)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_is_valid(name, files):
    config = compression.recipe(task_of(name, files))
    with torch.device("meta"):
        vae = build_tokenizer(config)
    if VARIANTS[name].tokenizer is None:
        assert (vae.config.frequency_complement is None) == (config.loss.spectrum.weight == 0)
    if name.startswith("published"):
        right = compression.recipe(task_of(name.replace("published", "both"), files)).loss
        for section in ("rate", "focal_frequency", "spectrum", "adversarial"):
            assert getattr(config.loss, section).weight == pytest.approx(255 * getattr(right, section).weight)
        assert config.loss.rate.weight_below == pytest.approx(255 * right.rate.weight_below)


def test_a_row_is_measured_by_its_files(files, monkeypatch):
    monkeypatch.setattr(compression, "PICTURES", (0, 1))
    monkeypatch.setattr(compression, "TRAIN", compression.TRAIN | {"resolution": 64, "batch_size": 2})
    row = compression.make_row(task_of("both_low", files))
    assert row["heldout"]["bpp"] > 8 * 26 / 128**2 and row["heldout"]["PSNR"] > 5 and row["curve"][-1][0] == 6
    assert row["heldout"][f"rFD({FEATURES})"] > 0 and (files / "pictures/both_low.png").exists()
    report = {"rows": [row]}
    monkeypatch.setattr(compression, "available_formats", lambda: ["jpeg"])
    compression.finish(report, files)
    assert report["formats"][0]["format"] == "jpeg" and report["formats"][0]["rate"] == "low"
    assert "`both_low` | 1 |" in compression.tables(report) and "jpeg, quality" in compression.tables(report)
    compression.figures(report, files / "compression")
    assert (files / "compression_spectra.png").exists()
    (low,) = (panel for panel in compression.spectra(report).values() if panel)
    half = np.array(low["both"])[32:]  # of 65 entries, for 128 px
    assert half.min() <= row["heldout"]["power kept"] <= half.max() and low["jpeg"] != low["both"]


def test_a_tokenizer_is_a_codec(files, monkeypatch):
    monkeypatch.setattr(compression, "PICTURES", (0, 1))
    monkeypatch.setattr(compression, "TRAIN", compression.TRAIN | {"resolution": 64, "batch_size": 2})
    row = compression.make_row(task_of("latents_med", files))
    assert row["validation"]["bpp"] == pytest.approx(0.5, rel=0.1) and [*files.glob("latents-0-*/final")]
    assert "`latents_med` | 1 |" in compression.tables({"rows": [row]})


def test_rows_are_compared_at_equal_bits():
    def row(bpp, psnr):
        return [{"heldout": {"bpp": bpp, "PSNR": psnr, "High": 0.1 / bpp, f"rFD({FEATURES})": 100.0}}]

    rows = {f"hific_{rate}": row(bpp, 30.0) for rate, bpp in (("low", 0.25), ("med", 0.5), ("high", 1.0))}
    rows |= {
        f"ffl_{rate}": row(bpp, psnr) for rate, bpp, psnr in (("low", 0.2, 28), ("med", 0.4, 30), ("high", 0.8, 32))
    }
    # Half a bit lies log(0.5 / 0.4) / log(2) = 0.32 of the way from 0.4 to 0.8.
    expected = 30 + 2 * np.log(0.5 / 0.4) / np.log(2) - 30
    assert at_equal_bits(rows, "ffl_med").startswith(f"{expected:+.2f} dB, ")
    assert at_equal_bits(rows, "ffl_high") == "" and at_equal_bits(rows, "hific_med") == ""
