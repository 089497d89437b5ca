"""The command line as a whole: its help costs nothing, and what goes wrong is one line and an exit code."""

import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, command, command_error, tiny_tokenizer_recipe, write_images

from favae.adapters.single_file import FORMATS
from favae.commands import caches
from favae.commands.conversion import EXPORT_FORMAT_NAMES, FORMAT_NAMES
from favae.data.latents import open_latents
from favae.errors import DataError

COMMANDS = (
    ("train-tokenizer",),
    ("train-generator",),
    ("cache-latents",),
    ("embed-captions",),
    ("verify",),
    ("reconstruct",),
    ("evaluate",),
    ("evaluate", "reconstruction"),
    ("evaluate", "generation"),
    ("evaluate", "latents"),
    ("evaluate", "compression"),
    ("compress",),
    ("decompress",),
    ("reference-statistics",),
    ("compare",),
    ("preview",),
    ("convert",),
    ("export",),
    ("half-precision",),
    ("report",),
)

HELP = """
import contextlib, io, sys
from favae.cli import main
for words in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert "usage: favae" in printed.getvalue() and len(printed.getvalue()) > 100, words
heavy = {{"torch", "diffusers", "matplotlib", "transformers", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy():
    code = HELP.format(commands=((), *COMMANDS))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_command_that_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        command("compress", "images", "--model", "model", "--output", "files")
    assert "run it without torchrun" in capsys.readouterr().err


def test_python_m_favae_is_the_command():
    result = subprocess.run([sys.executable, "-m", "favae", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage: favae")
    assert all(words[0] in result.stdout for words in COMMANDS)


@pytest.mark.parametrize("words", [(), ("unknown",), ("compare", "a.json"), ("compare", "a", "b", "--no-such-option")])
def test_a_wrong_option_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as error:
        command(*words)
    assert error.value.code == 2 and "usage: favae" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, message",
    [
        (DataError("not good"), "error: not good"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "error: a.png: No such file or directory"),
        (OSError("first line\nsecond line"), "error: first line"),
        (ValueError("not a number"), "error: not a number"),
        (DataError("Caught DataError in DataLoader worker process 0.\nTraceback\nnot good"), "error: not good"),
    ],
)
def test_an_error_of_a_user_is_one_line(error, message, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(caches, "embed_captions", fail)
    assert command_error("embed-captions", "--latents", "x", "--encoder", "y") == message


def test_messages_name_the_options_of_the_command(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"picture": [1]}), tmp_path / "x.parquet")
    words = ("evaluate", "reconstruction", "--model", "x", "--data", tmp_path / "x.parquet", "--resolution", 16)
    message = command_error(*words, "--output", tmp_path / "out")
    assert "no column 'image'" in message and "--image-column" in message
    missing = ("--features", "resnet18", "--weights", f"resnet18={tmp_path / 'none.pt'}")
    message = command_error(*words[:4], "--data", "photos", "--resolution", 16, "--output", "x", *missing)
    assert "none.pt" in message and "--weights NAME=FILE" in message


def test_an_interrupt_says_what_happens_next(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "embed_captions", interrupt)
    with pytest.raises(SystemExit) as error:
        command("embed-captions", "--latents", "x", "--encoder", "y")
    assert error.value.code == 130 and "continues with the shards" in capsys.readouterr().err


def test_training_scripts_get_their_words(tmp_path, image_folder, capsys):
    recipe = tiny_tokenizer_recipe(tmp_path, image_folder)
    command("train-tokenizer", recipe, "seed=5", "--dry-run", "train.steps=7", "--processes", "2")
    printed = capsys.readouterr().out
    assert "seed: 5" in printed and "steps: 7" in printed
    assert "no_such_key" in command_error("train-tokenizer", recipe, "train.no_such_key=1")


@pytest.mark.parametrize(
    "data, output, named",
    [("photos", "a.npz", "--output must end in .safetensors"), ("x.npz", "a.safetensors", "x.npz holds statistics")],
)
def test_statistics_are_of_images_and_in_one_kind_of_file(data, output, named):
    words = ("--data", data, "--resolution", "16", "--features", "efficientnet-lite0", "--output", output)
    assert named in command_error("reference-statistics", *words)


def test_a_small_cache_of_the_images_that_are_large_enough(tmp_path, tiny_favae):
    tiny_favae.save_pretrained(tmp_path / "vae")
    write_images(tmp_path / "images", classes=2, per_class=2)
    write_images(tmp_path / "images/large", classes=1, per_class=3, size=(40, 32))
    words = ("--tokenizer", tmp_path / "vae", "--data", tmp_path / "images", "--label-column", "none")
    words += ("--resolution", 16, "--min-size", 30)
    for name, *more in (("plain",), ("compressed", "--compress"), ("half", "--dtype", "bfloat16")):
        command("cache-latents", *words, *more, "--output", tmp_path / name)
    plain, *others = (open_latents(tmp_path / name) for name in ("plain", "compressed", "half"))
    indices = (np.arange(3), np.zeros(3, int), np.zeros(3, int))
    for cache, error in zip(others, (0.1, 0.01)):
        assert len(cache) == len(plain) == 3
        torch.testing.assert_close(
            cache.read(*indices)["mean"].float(), plain.read(*indices)["mean"], rtol=0, atol=error
        )
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*")) for name in ("plain", "compressed")]
    assert sizes[1] < sizes[0]


def test_formats_are_those_that_can_be_converted():
    assert set(FORMAT_NAMES) == set(FORMATS) | {"taesd"}
    writable = {name for name, layout in FORMATS.items() if layout.revert is not None}
    assert set(EXPORT_FORMAT_NAMES) == writable | {"onnx"}


@pytest.mark.parametrize(
    "options, named",
    [
        (("--resolution", "-32"), "--resolution: must be greater than or equal to 1, got '-32'"),
        (("--batch-size", "0"), "--batch-size: must be"),
        (("--num-workers", "-1"), "--num-workers: must be"),
        (("--tokenizer", ""), "--tokenizer: must have at least 1 character"),
        (("--output", ""), "--output: must have at least 1 character"),
    ],
)
def test_an_impossible_value_is_exit_code_2(options, named, capsys):
    words = ["cache-latents", "--tokenizer", "x", "--resolution", "16", "--output", "y", "--data", "photos", *options]
    with pytest.raises(SystemExit) as error:
        command(*words)
    assert error.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below", "link", "x" * 300, "/dev/null/x"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_opened(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    words = ("--tokenizer", "no-such-model", "--resolution", 16, "--data", "no-such-data")
    assert "--output" in command_error("cache-latents", *words, "--output", tmp_path / place)
    recipe = tiny_tokenizer_recipe(tmp_path, "photos")
    assert "output: " in command_error("train-tokenizer", recipe, f"output={tmp_path / place}", "--dry-run")
    words = ("--model", "no-such-model", "--output", tmp_path)
    assert "is a folder" in command_error("reconstruct", "no-such-image", *words)
    assert (tmp_path / "file").read_text() == "mine"


def test_of_processes_that_fail_together_the_first_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))  # as torchrun sets it

    def fail(error):
        def run(arguments):
            raise error

        monkeypatch.setattr(caches, "embed_captions", run)
        with pytest.raises(SystemExit) as ended:
            command("embed-captions", "--latents", "x", "--encoder", "y")
        return ended.value.code

    with pytest.raises(KeyError):
        fail(KeyError("a bug keeps its traceback"))
    assert fail(DataError("not good")) == "error: not good"
    assert fail(DataError("not good")) == 1
    assert fail(RuntimeError("Connection closed by peer")) == 1  # what the end of another process looks like


class Broken(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if isinstance(self.error, Exception):
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "error, message",
    [
        (DataError("not good"), "error: not good"),
        (ValueError("not a number"), "error: not a number"),
        (None, "num_workers"),
    ],
)
def test_an_error_in_a_worker_is_one_line(error, message, monkeypatch):
    def read(arguments):
        list(torch.utils.data.DataLoader(Broken(error), num_workers=1))

    monkeypatch.setattr(caches, "embed_captions", read)
    assert message in command_error("embed-captions", "--latents", "x", "--encoder", "y")
