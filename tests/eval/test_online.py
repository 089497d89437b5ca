"""Evaluation during training changes nothing but the log, goes on after a kill, and counts epochs."""

import json

import datasets
import pytest
import torch
import yaml
from conftest import (
    ROOT,
    command,
    refusal,
    steps_trained,
    tiny_generator_recipe,
    tiny_tokenizer_recipe,
    train,
    train_whole_and_in_parts,
    weights,
    write_images,
)
from picture_files import encoded, smooth
from safetensors.torch import load_file

from favae import HyperpriorModelFA, LightningDiTPipeline
from favae.data.images import ImageDataset
from favae.data.sources import open_source
from favae.errors import ConfigError
from favae.eval import online
from favae.eval.online import epochs_to_reach
from favae.training.config import load_config
from favae.training.generator_config import GeneratorConfig


def test_epochs_to_reach():
    records = [{"epoch": 1.0, "FID": 9.0}, {"epoch": 2.0, "FID": 4.0}, {"epoch": 3.0, "FID": 5.0}, {"epoch": 4.0}]
    found = epochs_to_reach(records, "FID", [10.0, 5.0, 2.0])
    assert found == {"EP_FID@10": 1.0, "EP_FID@5": 2.0, "EP_FID@2": None}


def test_guidance_is_checked_and_reaches_the_pipeline(tiny_cache, tmp_path, monkeypatch):
    recipe = tiny_generator_recipe(tmp_path, tmp_path / "cache", tmp_path / "tokenizer")
    for setting in ("guidance_channels=0", "guidance_channels=7", "guidance_interval=[0.5,0.1]"):
        for section in ("sampling", "evaluation"):
            with pytest.raises(ConfigError, match=f"{section}.{setting.partition('=')[0]}"):
                load_config(GeneratorConfig, recipe, [f"{section}.{setting}"])
    dit = load_config(GeneratorConfig, ROOT / "configs/generator/dit_b_f16d32.yaml").model
    channels = dit.pop("in_channels")  # of the class: 4
    dit.pop("out_channels", None)
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump({"output": "run", "model": dit}))
    with pytest.raises(ConfigError, match="guidance_channels must be at most model.in_channels, got 5"):
        load_config(GeneratorConfig, tmp_path / "dit.yaml", ["sampling.guidance_channels=5"])
    assert channels > 5
    with pytest.raises(ConfigError, match="sampling.guidance_channels is for generators that LightningDiT"):
        load_config(GeneratorConfig, ROOT / "configs/generator/emoji_cat.yaml", ["sampling.guidance_channels=3"])

    calls, plain = [], LightningDiTPipeline._guide
    monkeypatch.setattr(LightningDiTPipeline, "_guide", lambda self, *args: calls.append(args[1:]) or plain(*args))
    guidance = ["sampling.guidance_scale=10", "sampling.guidance_interval=[0.5,1]", "sampling.guidance_channels=3"]
    command("train-generator", recipe, *guidance, "train.steps=3", f"output={tmp_path / 'run'}")
    assert calls == [(10.0, 3)]  # of three times, 0, 1/3 and 2/3, one is in the interval


def test_training_is_the_same_with_evaluation(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(online, "TARGETS", (1.0, 1e9))
    recipe = tiny_generator_recipe(tmp_path, tmp_path / "cache", tmp_path / "tokenizer")
    settings = {"every": 3, "reference": tmp_path / "images", "features": "efficientnet-lite0", "num_images": 8}
    settings["num_inference_steps"] = 2
    published = {"guidance_scale": 10.0, "guidance_interval": [0.1, 1.0], "guidance_channels": 3}
    settings |= published
    evaluation = [f"evaluation.{key}={value}" for key, value in settings.items()]
    command("train-generator", recipe, f"output={tmp_path / 'plain'}")
    command("train-generator", recipe, f"output={tmp_path / 'evaluated'}", *evaluation)
    weights = [
        load_file(next((tmp_path / name / "final/transformer").glob("*.safetensors")))
        for name in ("plain", "evaluated")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    log = tmp_path / "evaluated/evaluation.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6]
    assert [record["epoch"] for record in records] == [3 * 4 / 12, 6 * 4 / 12]
    metric = "FD(efficientnet-lite0)"
    assert published.items() <= records[0]["protocol"].items()
    assert (records[0]["protocol"]["shift"], records[0]["protocol"]["seed"]) == (1.0, 0)
    assert records[0][metric] > 0 and records[0][metric] != records[1][metric]
    assert records[1][f"EP_{metric}@1e+09"] == 1.0 and records[1][f"EP_{metric}@1"] is None
    assert records[0]["seams"] > 0
    assert not (tmp_path / "evaluated/evaluation").exists()

    log.write_text(log.read_text() + '{"step": 7, "torn')
    again = [f"output={tmp_path / 'evaluated'}", *evaluation, "train.steps=9", "evaluation.num_images=4"]
    command("train-generator", recipe, *again)
    more = [json.loads(line) for line in log.read_text().splitlines()]
    assert more[:2] == records and [record["step"] for record in more] == [3, 6, 9]
    assert more[2]["protocol"]["num_images"] == 4 and records[0]["protocol"]["num_images"] == 8
    assert more[2][f"EP_{metric}@1e+09"] == 3.0  # the lines of eight images are another protocol


def test_a_tokenizer_is_evaluated_and_trained_as_before(tmp_path, caplog):
    """The metrics are those of `favae evaluate` on the weights that are saved."""
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    others = write_images(tmp_path / "others", classes=2, per_class=16)
    settings = {"every": 4, "data": others, "features": "efficientnet-lite0", "num_images": 32, "batch_size": 7}
    evaluation = [
        "train.lr_scheduler=constant",
        "train.lr_warmup_steps=0",
        *(f"evaluation.{key}={value}" for key, value in settings.items()),
    ]
    train(
        "train_tokenizer",
        recipe,
        f"output={tmp_path / 'plain'}",
        "train.lr_scheduler=constant",
        "train.lr_warmup_steps=0",
    )
    train("train_tokenizer", recipe, f"output={tmp_path / 'run'}", "train.steps=4", *evaluation)
    assert steps_trained("train_tokenizer", recipe, f"output={tmp_path / 'run'}", *evaluation) == 4
    assert weights(tmp_path / "plain/final") == weights(tmp_path / "run/final")

    records = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8] and records[1]["epoch"] == 8 * 2 / 12
    last = records[1]
    assert last["protocol"]["num_images"] == 32 and last["LPIPS"] is None
    data = ("--model", tmp_path / "run/final", "--data", others, "--resolution", "16", "--output", tmp_path / "out")
    for words in (("latents",), ("reconstruction", "--levels", "1", "--features", "efficientnet-lite0")):
        command("evaluate", *words, *data)
        (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
        for name, value in row["metrics"].items():
            assert last[name] == (None if value is None else pytest.approx(value, rel=1e-3)), name


def test_a_tokenizer_without_images_to_evaluate(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    assert "evaluation.data" in refusal("train_tokenizer", recipe, "evaluation.every=2")
    missing = refusal("train_tokenizer", recipe, "evaluation.every=2", f"evaluation.data={tmp_path / 'nowhere'}")
    assert "nowhere" in missing
    image = {"bytes": encoded(smooth()), "path": None}
    datasets.Dataset.from_dict({"image": [image], "label": [1.5]}).to_parquet(tmp_path / "set.parquet")
    options = ("evaluation.every=2", f"evaluation.data={tmp_path / 'set.parquet'}", "evaluation.features=null")
    assert "label column 'label'" in refusal("train_tokenizer", recipe, *options)
    assert not (tmp_path / "run").exists()


def test_a_compression_model_is_trained_resumed_and_evaluated_by_its_files(tmp_path):
    pytest.importorskip("constriction", reason="the extra [compression] is not installed")
    model = "{name: HyperpriorModelFA, block_out_channels: [8, 8, 16], num_residual_blocks: 1, latent_channels: 6, "
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    text = recipe.read_text()
    begin, end = text.index("{name: AutoencoderKLFA"), text.index("data:")
    recipe.write_text(text[:begin] + model + "hyper_channels: 8}\n" + text[end:])
    settings = {"every": 4, "data": tmp_path / "images", "features": "null", "batch_size": 8}
    options = [
        "train.lr_scheduler=constant",
        "train.lr_warmup_steps=0",
        "loss.spectrum.weight=0.1",
        *(f"evaluation.{key}={value}" for key, value in settings.items()),
    ]
    train_whole_and_in_parts("train_tokenizer", tmp_path, recipe, *options, steps=8, first=4)
    vae = HyperpriorModelFA.from_pretrained(tmp_path / "whole/final")
    images = ImageDataset(open_source(str(tmp_path / "images"), "validation"), 16)
    files = vae.compress(torch.stack([images[i]["image"] for i in range(len(images))]))
    last = json.loads((tmp_path / "whole/evaluation.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and last["bpp"] == pytest.approx(8 * sum(map(len, files)) / len(files) / 16**2)
    log = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert {"rate", "bits_per_pixel", "spectrum", "adversarial"} <= set(log)
