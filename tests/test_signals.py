"""Ctrl-C and SIGTERM: one line, its exit code, and nothing lost."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from datetime import timedelta

import pytest
import torch
from conftest import command, steps_trained, tiny_generator_recipe, tiny_tokenizer_recipe, train, weights

import favae.data.latent_writing
from favae.distributed import process_state
from favae.training.run import Run


@pytest.mark.parametrize(
    ("script", "number", "code", "workers"),
    [("train_tokenizer", signal.SIGINT, 130, 0), ("train_generator", signal.SIGTERM, 143, 1)],
)
def test_a_training_ends_after_its_step_and_goes_on_as_if_nothing_had_happened(
    script, number, code, workers, tiny_cache, monkeypatch, capsys
):
    if script == "train_tokenizer":
        recipe = tiny_tokenizer_recipe(tiny_cache, tiny_cache / "images")
    else:
        recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    words = (script, recipe, "train.steps=6", "train.checkpoint_every=4", f"train.num_workers={workers}")
    train(*words, f"output={tiny_cache / 'whole'}")
    output, end_step = tiny_cache / "run", Run.end_step

    def end_third_step(run, finite):
        if run.step == 2:
            signal.raise_signal(number)
        end_step(run, finite)

    monkeypatch.setattr(Run, "end_step", end_third_step)
    capsys.readouterr()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        train(*words, f"output={output}")
    assert ended.value.code == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line and "s/it" not in line]
    assert len(said) == 1 and said[0].startswith("interrupted at step 3: ")
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-3"]
    monkeypatch.setattr(Run, "end_step", end_step)
    assert steps_trained(*words, f"output={output}") == 3
    assert weights(output / "final") == weights(tiny_cache / "whole/final")
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_launchers_signal_to_all_leaves_workers_until_the_step_is_done(tiny_cache, monkeypatch):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = ["train.num_workers=1", "train.gradient_accumulation_steps=8"]  # more than a worker reads ahead
    collect = Run.collect

    def signal_all(run, logs):
        if run.step == 2 and not run._collected:
            for worker in multiprocessing.active_children():
                subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
            time.sleep(0.5)
            signal.raise_signal(signal.SIGTERM)
        collect(run, logs)

    monkeypatch.setattr(Run, "collect", signal_all)
    with pytest.raises(SystemExit) as ended:
        train("train_generator", recipe, f"output={tiny_cache / 'run'}", "train.steps=4", *more)
    assert ended.value.code == 143 and (tiny_cache / "run/checkpoints/step-3").is_dir()
    workers = multiprocessing.active_children()  # the exception keeps their loader; at its end, python does this:
    for worker in workers:
        worker.terminate()
        worker.join(30)
    assert workers and all(worker.exitcode == 0 for worker in workers)


@pytest.mark.parametrize(("step", "signals"), [(1, 1), (2, 2)], ids=["the first in the first step", "a second"])
def test_a_signal_ends_a_training_at_once(step, signals, tiny_cache, monkeypatch):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    end_step = Run.end_step

    def never_ends(run, finite):
        if run.step + 1 < step:
            return end_step(run, finite)
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(Run, "end_step", never_ends)
    with pytest.raises(SystemExit) as ended:
        train("train_generator", recipe, f"output={tiny_cache / 'run'}")
    assert ended.value.code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_ends_at_once_and_goes_on_when_it_is_run_again(number, code, tiny_cache, monkeypatch, capsys):
    words = ["cache-latents", "--tokenizer", tiny_cache / "tokenizer", "--data", tiny_cache / "images"]
    words += ["--resolution", 16, "--shard-size", 4, "--output", tiny_cache / "new"]
    encode, calls = favae.data.latent_writing._encode, []

    def encode_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return encode(*arguments)

    monkeypatch.setattr(favae.data.latent_writing, "_encode", encode_once)
    with pytest.raises(SystemExit) as ended:
        command(*words)
    assert ended.value.code == code and "interrupted" in capsys.readouterr().err
    assert len(list((tiny_cache / "new").glob("shard-*"))) == 1
    command(*words)
    assert len(calls) == 4 and (tiny_cache / "new/manifest.json").exists()


def test_processes_wait_for_each_other_as_long_as_it_takes():
    """PyTorch's own patience, of half an hour, is a second here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_wait, args=(rank, port), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


def _wait(rank: int, port: int) -> None:
    from accelerate.state import PartialState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.distributed_c10d._get_default_timeout = lambda backend: timedelta(seconds=1)
    PartialState._reset_state()
    state = process_state()
    if rank == 1:
        time.sleep(2.5)
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()
