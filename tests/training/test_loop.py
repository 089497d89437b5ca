import errno
import json
import math

import pytest
import torch
from conftest import tiny_tokenizer_recipe
from torch import nn

from favae.errors import CheckpointError, ConfigError, NonFiniteError
from favae.training.checkpoints import Ema, find_checkpoints
from favae.training.config import TokenizerConfig, load_config, to_yaml
from favae.training.loop import Run, changed_settings


def test_ema_against_its_formula(tiny_favae):
    model = nn.Linear(2, 2, bias=False)
    ema = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight += 1
        ema.step()
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))  # diffusers' ramp: (1 + n) / (10 + n), n = step - 1
        expected = decay * expected + (1 - decay) * model.weight.detach()
    raw = model.weight.detach().clone()
    with ema as averaged:
        assert torch.allclose(averaged.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, raw)


@pytest.fixture
def run(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    config = load_config(TokenizerConfig, recipe, [f"output={tmp_path / 'run'}", "train.max_skipped_steps=2"])
    run = Run(config)
    run.add("generator", nn.Linear(1, 1), 0.1)
    run.model = run.prepare({}, averaged=nn.Linear(1, 1))["generator"]
    run.resume()
    return run


def one_step(run, value: float) -> torch.Tensor:
    with run.accelerator.accumulate(run.model):
        loss = (run.model(torch.ones(1, 1)) * value).sum()
        finite = run.optimise("generator", loss)
    run.end_step({"reconstruction": loss.detach(), "kl": torch.tensor(1.0)}, finite)
    return run.model.weight.detach().clone()


def test_non_finite_steps_are_skipped_counted_and_end_the_run(run):
    weight = one_step(run, 1.0)
    assert torch.equal(one_step(run, math.nan), weight)
    assert torch.equal(one_step(run, math.inf), weight)
    weight = one_step(run, 1.0)  # recovers, and the count in a row starts again
    assert run.skipped == 2
    one_step(run, math.nan)
    one_step(run, math.nan)
    with pytest.raises(NonFiniteError, match="step 7: reconstruction has not been finite for 3 steps.*none was"):
        one_step(run, math.nan)
    assert torch.equal(run.model.weight, weight)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records] == [0, 1, 2, 2, 3, 4]


def test_only_complete_checkpoints_are_found_in_order_of_steps(tmp_path):
    for name in ("step-10", "step-9", ".writing-step-11", "step-x"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in find_checkpoints(tmp_path)] == [9, 10]


def test_changed_settings_are_named(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(TokenizerConfig, recipe)))

    def changed(*overrides):
        return changed_settings(load_config(TokenizerConfig, recipe, list(overrides)), tmp_path / "config.yaml")

    assert changed() == [] and changed("train.steps=99", "output=x", "train.log_every=7") == []
    assert changed("train.batch_size=3", "loss.kl=0.1", "seed=2") == ["loss.kl", "seed", "train.batch_size"]


def test_a_folder_with_another_run_is_refused(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    output = f"output={tmp_path / 'run'}"
    (tmp_path / "run/checkpoints/step-2").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-2/trainer_state.json").touch()
    (tmp_path / "run/config.yaml").write_text(to_yaml(load_config(TokenizerConfig, recipe)))
    for overrides, message in (
        (["seed=1"], "other settings .seed."),
        (["resume=never"], "holds a run already"),
        (["resume=/nowhere"], "not a checkpoint"),
        ([f"resume={tmp_path / 'run/checkpoints/step-2'}"], "holds a run already: resume=auto goes on with it"),
    ):
        with pytest.raises(ConfigError, match=message):
            Run(load_config(TokenizerConfig, recipe, [output, *overrides]))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter: No space left")]
)
def test_a_full_disk_leaves_the_older_checkpoint(run, monkeypatch, full):
    run.checkpointer.save(1, {})
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}

    def write(*arguments, **options):
        raise full

    monkeypatch.setattr("favae.training.checkpoints.save_module", write)
    with pytest.raises(CheckpointError, match=r"step-2 needs about 0.00 GB, .* GB are free in .*; the last .*step-1"):
        run.checkpointer.save(2, {})
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    monkeypatch.setattr("favae.training.checkpoints.save_module", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.checkpointer.save(2, {})
