"""The benchmarks' tables, and that every model they name can be built at the budget it claims."""

import importlib

import pytest
import torch
from conftest import ROOT

from favae.autoencoders import measure_budget
from favae.training.config import TokenizerConfig, load_config
from favae.training.models import TOKENIZERS, build_model


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    control = importlib.import_module("equal_budget").Control
    TOKENIZERS.pop("Control", None)  # what the import registers is known for the length of a test
    monkeypatch.setitem(TOKENIZERS, "Control", control)
    return importlib.import_module


def build(experiment):
    with torch.device("meta"):
        return build_model(experiment.model, TOKENIZERS)


def test_budgets_are_equal(scripts):
    experiments = scripts("equal_budget").EXPERIMENTS
    models = {name: build(experiment) for name, experiment in experiments.items()}
    budgets = {name: measure_budget(vae, 64) for name, vae in models.items()}
    assert all(budget.floats_per_image == 1024 for budget in budgets.values())
    flops = {name: budget.flops / budgets["stock"].flops for name, budget in budgets.items()}
    unequal = {"stock_wide", "published", "fast"}  # and their notes say so
    assert all(0.95 <= ratio <= 1.05 for name, ratio in flops.items() if name not in unequal), flops
    assert flops["fast"] <= 0.5
    wide, ours = (models[name].num_parameters() for name in ("stock_wide", "quality"))
    assert abs(wide / ours - 1) < 0.05


@pytest.mark.parametrize("name", ["equal_budget", "ablation"])
def test_recipes_of_all_rows_are_valid(scripts, name, tmp_path):
    import yaml

    for experiment in scripts(name).EXPERIMENTS.values():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(experiment.recipe(steps=800)))
        load_config(TokenizerConfig, tmp_path / "recipe.yaml")
        build(experiment)


def test_table_and_its_place_in_a_document(scripts, tmp_path):
    report = scripts("tokenizer_report")

    def row(model, seed, recon):
        errors = {"recon": recon, "low": 2 * recon, "high": recon / 2, "psnr": 20.0, "ssim": 0.5}
        size = {"params": 3_000_000, "flops": 1_300_000_000, "floats_per_image": 1024, "rfd": 100.0, "seconds": 60.0}
        return {"model": model, "seed": seed, **errors, **size, "validation": errors}

    rows = [row("stock", 0, 0.04), row("stock", 1, 0.06), row("ours", 0, 0.01)]
    text = report.table({"rows": rows, "throughput": {"ours": {"ratio": 1.25}}}, ["stock", "ours", "absent"], "stock")
    stock, ours = text.splitlines()[2:]
    assert "| `stock` | 2 | 1,024 | 3.0 M | 1.30 |" in stock and "0.0500 ± 0.0141 (1.00)" in stock
    assert "| 1.25 | 0.0100 (0.20) | 0.0200 (0.20) | 0.00500 (0.20) |" in ours
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- here -->\nold\n<!-- end of here -->\nafter\n")
    report.write_section("here", text, document)
    assert document.read_text() == f"before\n<!-- here -->\n{text}\n<!-- end of here -->\nafter\n"
    with pytest.raises(ValueError, match="no place for 'elsewhere'"):
        report.write_section("elsewhere", text, document)
