"""The command line as a whole: its help costs nothing, and what goes wrong is one line and an exit code."""

import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, command, command_error, tiny_tokenizer_recipe

from favae import cli
from favae.adapters.single_file import FORMATS
from favae.commands import caches
from favae.commands.conversion import FORMAT_NAMES
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
    ("reference-statistics",),
    ("compare",),
    ("convert",),
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


def test_formats_are_those_that_can_be_converted():
    assert set(FORMAT_NAMES) == set(FORMATS)


def test_every_command_has_a_parser():
    parser = cli.build_parser()
    for words in COMMANDS:
        with pytest.raises(SystemExit) as error:
            parser.parse_args([*words, "--help"])
        assert error.value.code == 0
