"""Checkpoints that were damaged, and checkpoints that somebody else wrote."""

import contextlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Payload, refusal, tiny_generator_recipe, train

from favae.hashing import checksum
from favae.training.checkpoints import checksum_of_state, find_damage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of four steps, and the words that continue it."""
    from conftest import TINY_FAVAE, write_images

    from favae import AutoencoderKLFA
    from favae.data.images import ImageDataset
    from favae.data.latent_writing import write_latent_cache
    from favae.data.sources import open_source

    folder = tmp_path_factory.mktemp("trained")
    tokenizer = AutoencoderKLFA(**TINY_FAVAE).eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    images = ImageDataset(open_source(str(write_images(folder / "images"))), 16)
    write_latent_cache(tokenizer, images, folder / "cache")
    recipe = tiny_generator_recipe(folder, folder / "cache", folder / "tokenizer")
    train("train_generator", recipe, f"output={folder / 'run'}", "train.sample_every=0", "train.steps=4")
    return folder, ("train_generator", recipe, "train.sample_every=0")


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that run, and the words that continue it for two steps."""
    folder, words = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path / "run", (*words, f"output={tmp_path / 'run'}", "train.steps=6")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = (
    "trainer_state.json",
    "random-states-0.pt",
    "optimizers-0.pt",
    "ema/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_found(trained, tmp_path, file):
    whole = trained[0] / "run/checkpoints/step-4"
    assert find_damage(whole) is None
    for number, damage in enumerate((Path.unlink, flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-9]))):
        checkpoint = tmp_path / str(number)
        shutil.copytree(whole, checkpoint)
        damage(checkpoint / file)
        assert file in str(find_damage(checkpoint))


def test_the_newest_whole_checkpoint_is_continued_and_the_damaged_one_named(copied, caplog):
    run, words = copied
    (run / "checkpoints/step-4/random-states-0.pt").unlink()
    train(*words)
    assert re.search(r"step-4 is damaged \(random-states-0.pt is missing\)", caplog.text)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert find_damage(run / "checkpoints/step-4") is None
    assert (run / "checkpoints/damaged-step-4").is_dir()


def test_without_a_whole_checkpoint_nothing_begins_anew(copied):
    run, words = copied
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for step in (2, 4):
        file = run / f"checkpoints/step-{step}/optimizers-0.pt"
        flip_a_bit(file)
        before[file] = file.read_bytes()
    assert "step-2 is damaged" in refusal(*words)
    assert "step-4 is damaged" in refusal(*words[:-2], f"resume={run / 'checkpoints/step-4'}", f"output={run}-other")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_torn_files_of_a_run_are_named(copied):
    run, words = copied
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log + '{"step": 5, "lo')  # the end of a killed run
    train(*words)
    (run / "metrics.jsonl").write_text(log.replace("}", "", 1))
    assert "metrics.jsonl: line 1" in refusal(*words)
    (run / "metrics.jsonl").write_text(log)
    for content in ("model: {name: [", "", "- a list"):
        (run / "config.yaml").write_text(content)
        assert "config.yaml is damaged" in refusal(*words)


def test_nothing_in_a_checkpoint_is_executed(copied, tmp_path):
    """Each file in turn is a pickle that writes a file when it is opened as pickles are; the checkpoint is otherwise
    whole, as somebody would hand it out."""
    run, words = copied
    shutil.rmtree(run / "checkpoints/step-2")
    checkpoint, written = run / "checkpoints/step-4", tmp_path / "written"
    originals = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    pickle.loads(pickle.dumps(Payload(written)))
    assert written.exists()  # it works
    written.unlink()
    for file in originals:
        for write in (lambda payload, path: path.write_bytes(pickle.dumps(payload)), torch.save):
            for path, content in originals.items():
                path.write_bytes(content)
            write(Payload(written), file)
            if file.name != "trainer_state.json":
                state = json.loads(originals[checkpoint / "trainer_state.json"])
                state["files"][str(file.relative_to(checkpoint))] = [file.stat().st_size, checksum(file)]
                del state["checksum"]
                state["checksum"] = checksum_of_state(state)
                (checkpoint / "trainer_state.json").write_text(json.dumps(state))
                assert find_damage(checkpoint) is None
            with contextlib.suppress(SystemExit):  # files that are not needed change nothing
                train(*words)
            shutil.rmtree(run / "checkpoints/step-6", ignore_errors=True)
            assert not written.exists(), file
