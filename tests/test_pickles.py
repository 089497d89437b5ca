"""Nothing that a program reads is executed: each file in turn becomes a pickle that would write a file."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Payload, command, tiny_generator_recipe, train


def plant(payload: Payload, file: Path, zipped: bool) -> None:
    with file.open("wb") as stream:
        if zipped:
            torch.save({"state_dict": payload}, stream)
        else:
            pickle.dump(payload, stream)


def attempt(*words, written: Path) -> None:
    try:
        command(*words)
    except SystemExit as end:
        assert end.code != 2, words  # the command itself is right
    assert not written.exists(), words


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_models_caches_and_results(zipped, tiny_cache):
    written, copies = tiny_cache / "written", tiny_cache / "copies"
    payload = Payload(written)
    pickle.loads(pickle.dumps(payload))
    written.unlink()  # it works
    data = ["--data", tiny_cache / "images", "--resolution", 16]
    features = ["--features", "efficientnet-lite0"]
    command("reference-statistics", *data, *features, "--output", tiny_cache / "reference/statistics.safetensors")
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    train("train_generator", recipe, f"output={tiny_cache / 'run'}", "train.steps=1", "train.sample_every=0")

    output = ("--output", copies / "new")

    def reading(name: str) -> tuple:
        """A command that reads a copy of that folder."""
        folder, reference = copies / name, tiny_cache / "reference/statistics.safetensors"
        if name == "tokenizer":
            return ("cache-latents", "--tokenizer", folder, *data, *output)
        if name == "cache":
            return ("train-generator", recipe, f"data.latents={folder}", f"output={copies / 'new'}", "train.steps=1")
        if name == "run/final":
            sampled = ("--pipeline", folder, "--num-images", 2, "--num-inference-steps", 1)
        else:
            sampled, reference = ("--samples", tiny_cache / "images/class0"), folder / "statistics.safetensors"
        return ("evaluate", "generation", *sampled, "--reference", reference, *features, *output)

    count = 0
    for name in ("tokenizer", "cache", "run/final", "reference"):
        for original in sorted((tiny_cache / name).rglob("*")):
            if not original.is_file() or original.suffix == ".py":
                continue
            shutil.rmtree(copies, ignore_errors=True)
            shutil.copytree(tiny_cache / name, copies / name)
            file = copies / name / original.relative_to(tiny_cache / name)
            plant(payload, file, zipped)
            attempt(*reading(name), written=written)
            if file.name.endswith("model.safetensors"):  # diffusers looks for it when there is no other
                file.rename(file.with_suffix(".bin"))
                attempt(*reading(name), written=written)
            count += 1
    assert count == 14
