import json
import math
import multiprocessing
import os
import shutil
import signal
import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import TINY_CAT, tiny_tokenizer_recipe
from torch import nn

from favae import CATTransformerModel
from favae.errors import CheckpointError, ConfigError, FolderInUse, NonFiniteError
from favae.training.checkpoints import find_checkpoints
from favae.training.config import load_config, to_yaml
from favae.training.optimization import (
    Ema,
    clip_gradients,
    create_optimizers,
    create_schedule,
    optimizer_step,
    weight_decay_groups,
)
from favae.training.run import Run, changed_settings, process_seed, same_value
from favae.training.tokenizer_config import TokenizerConfig


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_against_its_formula(warmup):
    model = nn.Linear(2, 2, bias=False)
    ema = Ema(model, decay=0.5, warmup=warmup)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight += 1
        ema.step()
        decay = 0.5
        if warmup:  # diffusers' ramp: (1 + n) / (10 + n), n = step - 1
            decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    raw = model.weight.detach().clone()
    with ema as averaged:
        assert torch.allclose(averaged.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, raw)


def test_weight_decay_spares_biases_norms_embeddings_and_positions():
    model = CATTransformerModel(**TINY_CAT, relative_position=True, attention="shared_key_value")
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decaying, spared = weight_decay_groups(model, [p for p in model.parameters() if p.requires_grad])
    found = [{names[id(parameter)] for parameter in group["params"]} for group in (decaying, spared)]
    assert not found[0] & found[1] and found[0] | found[1] == set(names.values())
    assert "weight_decay" not in decaying and spared["weight_decay"] == 0
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert found[0] == {f"{name}.weight" for name in layers - {"frozen"}}
    assert {"start_token", "row_position", "column_position", "norm_in.weight"} <= found[1]
    assert any("embed" in name for name in found[1])  # of the tokens, to which the logits are tied


class Training:
    """A run of one weight, with the steps of a training script."""

    def __init__(self, config):
        self.run = Run(config)
        module = nn.Linear(1, 1)
        optimizers = create_optimizers([{"params": module.parameters()}], config.train, 0.1)
        self.schedules = [create_schedule(optimizers[0], config.train)]
        self.model, self.optimizers = self.run.prepare(module, optimizers)
        self.run.start({}, Ema(module, 0.0), self.optimizers, self.schedules)

    def step(self, value: float, logged: float | None = 1.0) -> torch.Tensor:
        accelerator = self.run.accelerator
        with accelerator.accumulate(self.model):
            loss = (self.model(torch.ones(1, 1)) * value).sum()
            accelerator.backward(loss)
            finite = clip_gradients(accelerator, self.model, None)
            optimizer_step(accelerator, self.optimizers, self.schedules, finite)
        others = {} if logged is None else {"kl": torch.tensor(logged)}
        self.run.collect({"reconstruction": loss.detach(), **others})
        if accelerator.sync_gradients:
            self.run.end_step(finite)
        return self.model.weight.detach().clone()


def training_of(tmp_path, *settings: str) -> Training:
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would find it
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    return Training(load_config(TokenizerConfig, recipe, [f"output={tmp_path / 'run'}", *settings]))


@pytest.fixture
def training(tmp_path):
    return training_of(tmp_path, "train.max_skipped_steps=2")


def test_the_log_has_all_micro_batches(tmp_path):
    training = training_of(tmp_path, "train.gradient_accumulation_steps=2", "train.max_skipped_steps=0")
    for logged in (1.0, 3.0, 5.0, 5.0):
        training.step(1.0, logged)
    records = [json.loads(line) for line in (training.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["kl"] for record in records] == [2.0, 5.0]
    training.step(math.nan)
    with pytest.raises(NonFiniteError, match="step 3: reconstruction has not been finite"):
        training.step(1.0)  # though this micro-batch is


def test_neighboring_seeds_and_processes_share_no_random_numbers():
    seeds = [process_seed(seed, process) for seed in range(20) for process in range(256)]
    assert len(set(seeds)) == len(seeds) and process_seed(3, 0) == 3
    assert 0 <= process_seed(2**32 - 1, 1) < 2**32


def test_processes_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("favae.training.run.gather_object", lambda values: [*values, "step-4"])
    with pytest.raises(CheckpointError, match="do not agree on the newest whole checkpoint"):
        training_of(tmp_path)


@pytest.mark.parametrize(("bf16", "warned"), [(False, True), (True, False)])
def test_a_processor_that_emulates_bfloat16_is_named(tmp_path, monkeypatch, caplog, bf16, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)
    training_of(tmp_path, "train.mixed_precision=bf16")
    assert ("emulate bfloat16; train.mixed_precision=no" in caplog.text) == warned


def test_the_mean_of_a_loss_that_begins_later_is_of_its_steps(tmp_path):
    training = training_of(tmp_path, "train.log_every=3")
    for logged in (None, 2.0, 4.0):
        training.step(1.0, logged)
    (record,) = [json.loads(line) for line in (training.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert record["kl"] == 3.0


def test_non_finite_steps_are_skipped_counted_and_end_the_run(training):
    weight = training.step(1.0)
    assert torch.equal(training.step(math.nan), weight)
    assert torch.equal(training.step(math.inf), weight)
    weight = training.step(1.0)  # recovers, and the count in a row starts again
    assert training.run.skipped == 2
    training.step(math.nan)
    training.step(math.nan)
    with pytest.raises(NonFiniteError, match="step 7: reconstruction has not been finite for 3 steps.*none was"):
        training.step(math.nan)
    assert torch.equal(training.model.weight, weight)
    records = [json.loads(line) for line in (training.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records] == [0, 1, 2, 2, 3, 4]


def test_only_complete_checkpoints_are_found_in_order_of_steps(tmp_path):
    for name in ("step-10", "step-9", ".writing-step-11", "step-x"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in find_checkpoints(tmp_path)] == [9, 10]


def test_changed_settings_are_named(tmp_path, monkeypatch):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(TokenizerConfig, recipe)))

    def changed(*overrides):
        return changed_settings(load_config(TokenizerConfig, recipe, list(overrides)), tmp_path / "config.yaml")

    assert changed() == [] and changed("train.steps=99", "output=x", "train.log_every=7") == []
    assert changed("data.num_images=7") == []
    assert changed("train.batch_size=3", "loss.kl=0.1", "seed=2") == ["loss.kl", "seed", "train.batch_size"]

    # A folder that was written before a setting existed has its default; one that has a setting no more differs by it.
    whole = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(whole.replace("  mask: 0.0\n", ""))
    assert changed() == [] and changed("loss.mask=1") == ["loss.mask"]
    (tmp_path / "config.yaml").write_text(whole.replace("  mask: 0.0\n", "  mask: 0.0\n  masc: 1.0\n"))
    assert changed() == ["loss.masc"]

    # Another path of the same folder is the same setting.
    monkeypatch.chdir(tmp_path)
    for name in ("images", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(TokenizerConfig, recipe, ["data.path=images"])))
    assert changed(f"data.path={tmp_path}/images") == [] and changed("data.path=./images/") == []
    assert changed("data.path=others") == changed("data.path=nowhere") == ["data.path"]


def test_the_built_in_photographs_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert same_value("photos", "photos") and not same_value("photos", "./photos")
    assert same_value("./photos", f"{tmp_path}/photos") and not same_value("there", "nowhere")


def test_a_finished_run_without_checkpoints_is_not_replaced_by_another(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(to_yaml(load_config(TokenizerConfig, recipe)))
    for overrides, message in (
        (["seed=1"], "other settings .seed.; choose another output$"),
        (["resume=never"], "holds"),
        ([], "a finished run without checkpoints"),
    ):
        with pytest.raises(ConfigError, match=message):
            Run(load_config(TokenizerConfig, recipe, [f"output={tmp_path / 'run'}", *overrides]))


def test_ways_to_shard_that_trainings_do_not_know_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ConfigError, match="Accelerate is set to FSDP.*train.shard=true"):
        training_of(tmp_path)


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / "run/checkpoints/.writing-step-7").mkdir(parents=True)
    training_of(tmp_path)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_checkpoints_that_another_process_writes_meanwhile_stay(tmp_path, monkeypatch):
    def lock(folder):
        (folder / "checkpoints/step-7").mkdir(parents=True)

    monkeypatch.setattr("favae.training.run.lock_folder", lock)
    with pytest.raises(FolderInUse, match="start again"):
        training_of(tmp_path)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-7"]


def test_a_folder_with_another_run_is_refused(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    output = f"output={tmp_path / 'run'}"
    (tmp_path / "run/checkpoints/step-2").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-2/trainer_state.json").touch()
    (tmp_path / "run/config.yaml").write_text(to_yaml(load_config(TokenizerConfig, recipe)))
    for overrides, message in (
        (["seed=1"], "other settings .seed."),
        (["resume=never"], "holds a run already"),
        ([f"resume={tmp_path / 'run/checkpoints/step-2'}"], "holds a run already; resume=auto continues it"),
    ):
        with pytest.raises(ConfigError, match=message):
            Run(load_config(TokenizerConfig, recipe, [output, *overrides]))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]


def test_no_checkpoint_is_written_while_steps_are_skipped(training):
    run, due = training.run, []
    for value in (1.0, math.nan, math.nan, 1.0, 1.0, 1.0):  # a checkpoint every second step
        training.step(value)
        due.append(run.checkpoint_due())
        if due[-1]:
            run.save_checkpoint()
    assert due == [False, False, False, True, False, True]
    assert [step for step, _ in find_checkpoints(run.folder / "checkpoints")] == [4, 6]


def test_an_interrupt_while_steps_are_skipped_leaves_the_last_checkpoint(training):
    run = training.run
    run.save_checkpoint()
    training.step(math.nan)
    with pytest.raises(KeyboardInterrupt):
        for _ in run.batches(OneNumber()):
            signal.raise_signal(signal.SIGTERM)
    assert [step for step, _ in find_checkpoints(run.folder / "checkpoints")] == [0]


class OneNumber:
    """A data set of one number."""

    def __len__(self) -> int:
        return 1

    def epoch(self, rng):
        return (rng.permutation(1),)

    def training_batch(self, entries, seeds):
        return {"number": torch.ones(len(seeds))}


class DyingWorkers(OneNumber):
    """A data set that ends as one whose workers a signal has reached."""

    def training_batch(self, entries, seeds):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker exited unexpectedly")


def test_the_last_step_is_kept_when_a_signal_reaches_the_workers_too(training):
    training.step(1.0)
    with pytest.raises(KeyboardInterrupt):
        next(training.run.batches(DyingWorkers()))
    assert [step for step, _ in find_checkpoints(training.run.folder / "checkpoints")] == [1]


def test_a_folder_that_another_process_writes_is_refused(training, tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    context = multiprocessing.get_context("fork")
    messages = context.SimpleQueue()

    def start():
        try:
            Training(load_config(TokenizerConfig, recipe, [f"output={training.run.folder}"]))
            messages.put("")
        except FolderInUse as error:
            messages.put(str(error))

    for released in (False, True):
        process = context.Process(target=start)
        process.start()
        process.join()
        message = messages.get()
        assert message == "" if released else f"process {os.getpid()} on {socket.gethostname()}" in message
        training.run.finish(lambda folder: folder.mkdir())
        shutil.rmtree(training.run.folder / "final")  # without a checkpoint, such a run is not begun again
