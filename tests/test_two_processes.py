"""Commands that two processes run together give what one gives."""

import json

import pytest
from conftest import TINY_LIGHTNINGDIT, command, run
from diffusers import FlowMatchEulerDiscreteScheduler

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.data.latents import load_tokenizer

FEATURES = ("--features", "efficientnet-lite0", "--batch-size", "4")


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def assert_same_results(one: dict, two: dict, num_images: int) -> None:
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    (first,), (second,) = one["rows"], two["rows"]
    numbers = {name: value for name, value in first["metrics"].items() if value is not None}
    assert {name: second["metrics"][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert one["protocol"] == two["protocol"] and one["protocol"]["num_images"] == num_images


def test_two_processes_write_the_same_cache(tiny_cache):
    words = ("cache-latents", "--tokenizer", tiny_cache / "tokenizer", "--data", tiny_cache / "images")
    words += ("--resolution", "16", "--shard-size", "5", "--batch-size", "5")
    command(*words, "--output", tiny_cache / "one")
    run("-m", "favae", *words, "--output", tiny_cache / "two", processes=2)
    names = sorted(path.name for path in (tiny_cache / "one").iterdir())
    assert len(names) == 5 and names == sorted(path.name for path in (tiny_cache / "two").iterdir())
    for name in names:
        assert (tiny_cache / "one" / name).read_bytes() == (tiny_cache / "two" / name).read_bytes(), name


def test_two_processes_measure_reconstructions_as_one(tiny_cache):
    sorted((tiny_cache / "images").rglob("*.png"))[3].unlink()  # 11 images: the processes' shares differ in size
    words = ("evaluate", "reconstruction", "--model", f"tiny={tiny_cache / 'tokenizer'}")
    words += ("--data", tiny_cache / "images", "--resolution", "16", *FEATURES)
    command(*words, "--output", tiny_cache / "one")
    run("-m", "favae", *words, "--output", tiny_cache / "two", processes=2)
    assert_same_results(results(tiny_cache / "one"), results(tiny_cache / "two"), num_images=11)
    assert {"Recon", "PSNR"} <= set(results(tiny_cache / "one")["rows"][0]["metrics"])


def test_two_processes_sample_and_measure_as_one(tiny_cache):
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT).eval()
    vae = load_tokenizer(str(tiny_cache / "tokenizer"))
    LightningDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler()).save_pretrained(tiny_cache / "pipeline")
    words = ("evaluate", "generation", "--pipeline", tiny_cache / "pipeline", "--num-images", "7")
    words += ("--reference", tiny_cache / "images", "--num-inference-steps", "2", "--guidance-scale", "2", *FEATURES)
    command(*words, "--output", tiny_cache / "one")
    run("-m", "favae", *words, "--output", tiny_cache / "two", processes=2)
    assert_same_results(results(tiny_cache / "one"), results(tiny_cache / "two"), num_images=7)
