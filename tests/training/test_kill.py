"""Two processes whose launcher is killed without warning while they write a checkpoint."""

import subprocess

import psutil
from conftest import ROOT, environment, launched, tiny_generator_recipe, train_in_processes, wait_for


def test_two_processes_of_a_killed_launcher_end_with_it_and_then_with_the_same_weights(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = ["train.steps=12", "train.sample_every=0"]
    assert train_in_processes(2, "train_generator", recipe, f"output={tiny_cache / 'whole'}", *more) == [0, 0]
    killed = tiny_cache / "killed"
    writing = killed / "checkpoints/.writing-step-6"
    command = launched(("train_generator.py", recipe, f"output={killed}", *more), processes=2)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **quiet)
    try:
        wait_for(writing, lambda: launcher.poll() is None)
    finally:
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
    assert len(family) > 2 and not alive  # the workers, which have sessions of their own, end with it
    assert (killed / "checkpoints/step-4/trainer_state.json").exists() and not (killed / "final").exists()
    assert train_in_processes(2, "train_generator", recipe, f"output={killed}", *more) == [0, 0]
    for file in sorted((tiny_cache / "whole/final").rglob("*.safetensors")):
        assert file.read_bytes() == (killed / file.relative_to(tiny_cache / "whole")).read_bytes()
    assert not list((killed / "checkpoints").glob(".writing*"))
