"""Two processes, killed without warning while they write a checkpoint."""

import os
import signal
import subprocess
import sys
import time

from conftest import ROOT, run, tiny_generator_recipe


def kill_while_writing(output, step: int, *command: str) -> None:
    """Starts two processes and kills them all as soon as the checkpoint of `step` is being written."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 180
        while not (output / f"checkpoints/.writing-step-{step}").exists():
            assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.001)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_processes_killed_while_writing_end_with_the_same_weights(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = ["train.steps=12", "train.sample_every=0"]
    run("train_generator.py", recipe, f"output={tiny_cache / 'whole'}", *more, processes=2)
    killed = tiny_cache / "killed"
    kill_while_writing(killed, 6, "train_generator.py", recipe, f"output={killed}", *more)
    assert (killed / "checkpoints/step-4/trainer_state.json").exists() and not (killed / "final").exists()
    run("train_generator.py", recipe, f"output={killed}", *more, processes=2)
    for file in sorted((tiny_cache / "whole/final").rglob("*.safetensors")):
        assert file.read_bytes() == (killed / file.relative_to(tiny_cache / "whole")).read_bytes()
    assert not list((killed / "checkpoints").glob(".writing*"))
