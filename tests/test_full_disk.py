"""Every kind of writing on a small disk that is really full: one line, and nothing unfinished is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, tiny_generator_recipe, tiny_tokenizer_recipe, train

# Runs in a process of its own that sees the folder DISK as a file system of 16 MB. Before each trial, all but so many
# kilobytes of it are filled.
TRIALS = """
import json, shutil, sys
from pathlib import Path
from accelerate.state import AcceleratorState
from favae import cli
import train_generator, train_tokenizer

disk, trials = Path(sys.argv[1]), json.loads(sys.argv[2])
programs = {"train_generator": train_generator.main, "train_tokenizer": train_tokenizer.main, "favae": cli.main}
for program, words, before in trials:
    for kilobytes in (0, 64):
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if before:
            shutil.copytree(before, disk / "out")
        whole = {str(path) for path in disk.rglob("*")}
        (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 1024 * kilobytes)))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            programs[program](words)
            message = ""
        except SystemExit as end:
            message = str(end.code)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        unfinished = [str(path) for path in disk.rglob(".writing-*")]
        lost = whole - {str(path) for path in disk.rglob("*")}
        print(json.dumps([program, words, message, unfinished, sorted(lost)]))
"""


def on_small_disk(folder: Path, *command: str | Path) -> list[str]:
    """The command, for which the folder is a file system of its own."""
    folder.mkdir(exist_ok=True)
    mount = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, str(folder), *map(str, command)]


def can_mount(folder: Path) -> bool:
    try:
        return subprocess.run(on_small_disk(folder, "true"), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_is_one_line_wherever_something_is_written(tmp_path, tiny_cache):
    disk, images, model = tmp_path / "disk", tmp_path / "images", tmp_path / "tokenizer"
    if not can_mount(disk):
        pytest.skip("this system does not let a test mount a small file system (unshare --mount)")
    tokenizer = tiny_tokenizer_recipe(tmp_path, images)
    generator = tiny_generator_recipe(tmp_path, tmp_path / "cache", model)
    train("train_tokenizer", tokenizer, f"output={tmp_path / 'run'}", "train.steps=2", "train.sample_every=0")
    out, steps = f"output={disk / 'out'}", "train.steps=4"
    data = ["--data", images, "--resolution", 16, "--output"]
    features = ["--features", "efficientnet-lite0"]
    trials = [
        ("train_tokenizer", [tokenizer, out, steps, "train.tracker=tensorboard"], None),
        ("train_tokenizer", [tokenizer, out, steps], tmp_path / "run"),
        ("train_generator", [generator, out, steps], None),
        ("favae", ["cache-latents", "--tokenizer", model, *data, disk / "out"], None),
        ("favae", ["reference-statistics", *data, disk / "a.safetensors", *features], None),
        ("favae", ["reconstruct", "--model", model, "--output", disk / "a.png", images / "class0/0.png"], None),
        ("favae", ["evaluate", "reconstruction", "--model", model, *data, disk / "out", *features], None),
    ]
    lines = [(program, [str(word) for word in line], before) for program, line, before in trials]
    result = subprocess.run(
        on_small_disk(disk, sys.executable, "-c", TRIALS, disk, json.dumps(lines, default=str)),
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    outcomes = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == 2 * len(trials)
    failed = [outcome for outcome in outcomes if outcome[2]]
    assert {(program, words[0]) for program, words, *_ in failed} == {(name, str(line[0])) for name, line, _ in trials}
    for program, words, message, unfinished, lost in failed:
        told = (program, words[0], message)
        assert message.startswith("error: the disk is full: ") and str(disk) in message, told
        assert len(message.splitlines()) == 1, told
        assert not unfinished and not lost, told
