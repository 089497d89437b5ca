"""The recipes of the tokenizers are valid and cost what they claim; they are trained, measured and compared."""

import json

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from experiments import ablation, equal_budget, tokenizers
from experiments.report import full_table, short_table
from experiments.rows import Comparison, main
from favae.autoencoders import measure_budget
from favae.training.config import load_config
from favae.training.tokenizer_config import TokenizerConfig


def test_flops_are_the_same_on_every_device():
    """Of attention, too, for which torch has one operation for each device."""
    variant = equal_budget.VARIANTS["stock"]
    with torch.device("meta"):
        expected = measure_budget(variant.build(), 64).flops
    assert measure_budget(variant.build(), 64).flops == expected


def test_budgets_are_equal():
    models = {name: variant.build() for name, variant in equal_budget.VARIANTS.items()}
    budgets = {name: measure_budget(vae, 64) for name, vae in models.items()}
    assert all(budget.floats_per_image == 1024 for budget in budgets.values())
    flops = {name: budget.flops / budgets["stock"].flops for name, budget in budgets.items()}
    unequal = {"stock_wide", "published", "fast"}  # and their notes say so
    assert all(0.95 <= ratio <= 1.05 for name, ratio in flops.items() if name not in unequal), flops
    assert flops["fast"] <= 0.5
    wide, ours = (models[name].num_parameters() for name in ("stock_wide", "quality"))
    assert abs(wide / ours - 1) < 0.05


@pytest.mark.parametrize("experiment", [equal_budget, ablation])
def test_recipes_of_all_rows_are_valid(experiment, tmp_path):
    for variant in experiment.VARIANTS.values():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(variant.recipe(steps=800)))
        config = load_config(TokenizerConfig, tmp_path / "recipe.yaml")
        assert config.train.steps == 800 and config.model == variant.model
        with torch.device("meta"):
            variant.build()


def test_a_tokenizer_is_trained_and_measured(tmp_path, monkeypatch):
    """A tiny model for a few steps, on a few photographs."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would find it
    load = tokenizers.load_photos
    monkeypatch.setattr(tokenizers, "load_photos", lambda *arguments: load(*arguments)[:8])
    model = {**equal_budget.PLAIN, "block_out_channels": [16, 16, 16, 16], "latent_channels": 4}
    variants = {"tiny": tokenizers.Variant(model, "a tiny model")}
    comparison = Comparison(
        "tiny",
        variants,
        tokenizers.make_row,
        lambda report: short_table(report, ["tiny"], "tiny") + full_table(report, ["tiny"], "tiny"),
        steps=4,
        seeds=1,
        resolution=32,
        batch_size=2,
        pictures=False,
    )
    output = tmp_path / "tiny.json"
    main(comparison, "", ["--output", str(output), "--runs", str(tmp_path / "runs"), "--jobs", "0"])
    (row,) = json.loads(output.read_text())["rows"]
    assert [point["steps"] for point in row["curve"]] == [1, 2, 3, 4]
    assert row["floats_per_image"] == 64 and row["recon"] > 0 and set(row["test"]) >= {"recon", "low", "high"}
    assert row["recon"] == pytest.approx((row["low"] + 3 * row["high"]) / 4, rel=1e-4)
    assert not (tmp_path / "runs/tiny-0-4/checkpoints").exists()
    assert "| `tiny` | 1 | 0.1 M |" in output.with_suffix(".md").read_text()


def test_tables_compare_with_the_reference():
    def row(model, seed, recon):
        errors = {"recon": recon, "low": 2 * recon, "high": recon / 2, "psnr": 20.0, "ssim": 0.5}
        size = {"params": 3_000_000, "flops": 1_300_000_000, "floats_per_image": 1024, "rfd": 100.0, "seconds": 60.0}
        return {"model": model, "seed": seed, **errors, **size, "validation": errors}

    rows = [row("stock", 0, 0.04), row("stock", 1, 0.06), row("ours", 0, 0.01)]
    report = {"rows": rows, "speed": {"ours": {"speedup": 1.25}}}
    stock, ours = full_table(report, ["stock", "ours", "absent"], "stock").splitlines()[2:]
    assert "| `stock` | 2 | 1,024 | 3.0 M | 1.30 |" in stock and "0.0500 ± 0.0141 (1.00)" in stock
    assert "| 1.25 | 0.0100 (0.20) | 0.0200 (0.20) | 0.00500 (0.20) |" in ours
    stock, ours = short_table(report, ["stock", "ours", "absent"], "stock").splitlines()[2:]
    assert "| `stock` | 2 | 3.0 M | 1.30 |" in stock and "| 1.25 | 0.0100 (0.20) |" in ours


def test_the_error_spectrum_is_a_share_of_the_power(monkeypatch):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    monkeypatch.setattr(tokenizers, "reconstruct", lambda vae, batch: batch / 2)
    shares = tokenizers.error_spectrum(None, images)
    assert len(shares) == 9 and shares == pytest.approx([0.25] * 9, abs=1e-4)
