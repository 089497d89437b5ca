"""The benchmarks compare what they say, and compute ratios and results right."""

import importlib
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm.optim.muon
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_LIGHTNINGDIT, tiny_tokenizer_recipe, train
from PIL import Image

from benchmarks import (
    cat_sampling,
    checks,
    compression,
    cpu_training,
    decoder_cost,
    generator_step,
    latent_loading,
    muon_step,
    on_gpu,
    packed_latents,
    sampling,
    tar_shards,
    timing,
    tokenizer_throughput,
    training_run,
)
from benchmarks.cat_sampling import uncached
from benchmarks.generator_step import with_published_blocks
from experiments.rows import parse_arguments
from favae import CATTransformerModel, LightningDiTTransformer2DModel
from favae.training.config import load_config


def test_calls_run_in_turn_and_warm_up(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float):
        order.append(name)
        clock[0] += seconds * (100 if len(order) <= 2 else 1)  # the first round is slow
        return len(order)

    calls = {"fast": lambda: call("fast", 1.0), "slow": lambda: call("slow", 3.0)}
    timings = timing.time_paired(calls, rounds=2)
    assert order == ["fast", "slow"] * 3
    assert timings["fast"].seconds == pytest.approx([1, 1]) and timings["slow"].seconds == pytest.approx([3, 3])
    assert timings["slow"].median == pytest.approx(3) and timings["slow"].result == 6


def test_ratios_are_taken_round_by_round():
    """A machine that slows down in the middle changes both times of a round, and no ratio."""
    result = timing.speedup([1.0, 10.0, 1.0], [2.0, 20.0, 4.0])
    assert result == {"speedup": 2.0, "speedup_range": [2.0, 4.0]}
    assert timing.with_range(result) == "2.00 times (2.00 to 4.00)"
    with pytest.raises(ValueError):
        timing.speedup([1.0], [1.0, 2.0])


@torch.no_grad()
def test_the_published_block_computes_the_same():
    ours = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT).eval()
    theirs = with_published_blocks(LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = ours.state_dict()
    rest = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    for k in range(len(ours.blocks)):

        def take(*names: str, part: str, k: int = k) -> torch.Tensor:
            return torch.cat([state[f"blocks.{k}.{name}.{part}"] for name in names])

        layers = {"qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("attn.to_out",)}
        layers |= {"w12": ("ff.gate", "ff.linear_in"), "w3": ("ff.linear_out",), "modulation.1": ("modulation",)}
        for name, parts in layers.items():
            rest |= {f"blocks.{k}.{name}.{part}": take(*parts, part=part) for part in ("weight", "bias")}
        rest |= {f"blocks.{k}.{name}.weight": take(name, part="weight") for name in ("norm1", "norm2")}
    missing, unexpected = theirs.load_state_dict(rest, strict=False)
    assert not unexpected and all(name.endswith((".cos", ".sin")) for name in missing)
    arguments = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 3])
    expected = ours(*arguments).sample
    assert expected.std() > 0.1 and torch.allclose(theirs(*arguments).sample, expected, atol=1e-5)


@torch.no_grad()
def test_tokens_sampled_without_a_cache_are_the_same():
    model = CATTransformerModel(sample_size=3, num_layers=2, num_attention_heads=2, attention_head_dim=8,
                                hidden_size=16, text_dim=8, codebook_size=32).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for place in (model.row_position, model.column_position):
        torch.nn.init.normal_(place, std=3.0)  # else the likeliest token is the last one again
    text, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    tokens = model.generate(text, mask, guidance_scale=3.0, temperature=0)
    assert torch.equal(uncached(model, text, mask, 3.0), tokens) and tokens.unique().numel() > 2


TINY_RUNS = {
    "cat_sampling": (
        cat_sampling,
        ["--size", "2", "--batch-size", "1", "--layers", "1", "--width", "64", "--heads", "1"],
    ),
    "compression": (compression, []),
    "cpu_training": (cpu_training, ["--only", "memory_format", "--recipes", "photos_favae"]),
    "decoder_cost": (decoder_cost, ["--spaces", "sd"]),
    "tar_shards": (tar_shards, ["--images", "4", "--shard-size", "3", "--reads", "2"]),
    "generator_step": (generator_step, ["--batch-size", "1"]),
    "sampling": (sampling, ["--batch-size", "1", "--num-inference-steps", "2"]),
    "tokenizer_throughput": (
        tokenizer_throughput,
        ["--recipes", "photos_favae", "--resolution", "32", "--batch-size", "1"],
    ),
    "latent_loading": (latent_loading, ["--images", "16", "--shard-size", "8", "--batch-size", "4"]),
}


@pytest.mark.parametrize("name", TINY_RUNS)
def test_benchmarks_write_their_result(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_training, "RESOLUTION", 16)
    monkeypatch.setattr(decoder_cost, "LATENT_SIDE", 2)
    monkeypatch.setattr(compression, "HEIGHT", 64)
    monkeypatch.setitem(generator_step.SIZES, "B", {**generator_step.SIZES["B"], "num_layers": 1})
    module, options = TINY_RUNS[name]
    output = tmp_path / "result.json"
    module.main([*options, "--rounds", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert {"command", "commit", "hardware", "versions"} <= set(result)
    assert ("entropy coder" if name == "compression" else "times") in capsys.readouterr().out


class Parsed(Exception):
    pass


@pytest.mark.parametrize("name", on_gpu.BENCHMARKS)
def test_the_benchmarks_on_a_gpu_have_the_options_they_are_called_with(name, monkeypatch):
    module_name, *words = on_gpu.BENCHMARKS[name]
    module = importlib.import_module(f"benchmarks.{module_name}")

    def parse(parser, output, argv, rounds=None):
        raise Parsed(timing.parse_arguments(parser, output, argv, rounds))

    monkeypatch.setattr(module, "parse_arguments", parse)
    with pytest.raises(Parsed):
        module.main([*words, "--output", "x.json"])


@pytest.mark.parametrize("name", [*on_gpu.TRAININGS, *on_gpu.ON_ALL_GPUS])
def test_the_trainings_on_a_gpu_have_valid_settings(name):
    variants = (on_gpu.TRAININGS | on_gpu.ON_ALL_GPUS)[name]
    for training, recipe, *settings in variants.values():
        schema, _ = training_run.TRAININGS[training]
        load_config(schema, ROOT / recipe, settings)


def test_the_checks_find_what_differs(tmp_path, image_folder, monkeypatch, capsys):
    """On a tiny model: a pass in bf16, tiles, and a training that is continued, which on a CPU is exact."""
    recipe = tiny_tokenizer_recipe(tmp_path, image_folder)

    def run_here(command, **_):
        train("train_tokenizer", *command[2:])

    monkeypatch.setattr(checks, "subprocess", SimpleNamespace(run=run_here))
    settings = [
        "model.shortcut=overlapping",
        "loss.adversarial.weight=0",
        "train.log_every=1",
        "train.lr_warmup_steps=0",
    ]
    words = [*settings, "--recipe", str(recipe), "--steps", "4", "--only", "bf16", "tiles", "resumed"]
    checks.main([*words, "--output", str(tmp_path / "checks.json")])
    report = json.loads((tmp_path / "checks.json").read_text())
    found = report["checks"]
    assert report["repeated"] == 0 and found["resumed"]["limit"] == checks.LIMITS["resumed"]
    assert found["resumed"]["difference"] == 0 and 0 < found["bf16"]["difference"] < 0.03
    assert set(found) == {"bf16", "tiles", "resumed"} and "bf16: " in capsys.readouterr().out
    monkeypatch.setitem(checks.LIMITS, "bf16", 1e-9)
    with pytest.raises(SystemExit, match="error: bf16: the difference is too large"):
        checks.main([*settings, "--recipe", str(recipe), "--only", "bf16", "--output", str(tmp_path / "checks.json")])


def test_trainings_may_differ_twice_as_much_as_two_of_the_same(tmp_path, monkeypatch):
    differences = {"bf16": 0.02, "repeated": 0.002, "resumed": 0.003, "ddp": 0.005}
    monkeypatch.setattr(checks, "passes", lambda *_: {"bf16": lambda: differences["bf16"]})
    monkeypatch.setattr(
        checks,
        "trainings",
        lambda *_: {name: lambda name=name: differences[name] for name in differences},
    )
    words = ["--recipe", str(ROOT / "configs/tokenizer/photos_favae.yaml"), "--output", str(tmp_path / "checks.json")]
    with pytest.raises(SystemExit, match="error: ddp: "):
        checks.main([*words, "--only", "bf16", "resumed", "ddp"])
    found = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert found["resumed"] == {"difference": 0.003, "limit": 0.004, "ok": True}
    assert found["bf16"]["limit"] == checks.LIMITS["bf16"]


def test_a_slice_is_ended_and_goes_on_later(tmp_path, capsys):
    """Ctrl-C after the minutes that it may take, also for what it has started; a failure is a failure."""
    waits = "import time, sys, pathlib\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n "
    child = f"{waits} pathlib.Path(sys.argv[1]).touch()"
    script = f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]])\n"
    script += "try:\n p.wait()\nfinally:\n p.wait()"
    on_gpu.run([sys.executable, "-c", script, str(tmp_path / "saved")], minutes=5 / 60)  # time enough to begin
    assert (tmp_path / "saved").exists() and "goes on" in capsys.readouterr().out
    with pytest.raises(subprocess.CalledProcessError):
        on_gpu.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_slice_that_does_not_end_is_killed(monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "PATIENCE", 0.5)
    script = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    start = time.monotonic()
    on_gpu.run([sys.executable, "-c", script], minutes=2 / 60)
    assert time.monotonic() - start < 30 and "goes on" in capsys.readouterr().out


def test_trainings_are_compared_within_the_minutes_of_their_slice(tmp_path, monkeypatch):
    """The second call goes on with what the first one has not come to."""
    monkeypatch.setattr(on_gpu, "OUTPUT", tmp_path)
    monkeypatch.setattr(on_gpu, "FILES", tmp_path)
    clock, calls = [0.0], []
    monkeypatch.setattr(on_gpu.time, "monotonic", lambda: clock[0])

    def run(command, minutes):
        calls.append((command[3], minutes))
        clock[0] += 120
        if minutes >= 2:
            found = {"settings": [], "seconds_per_step": 1 / len(calls), "images_per_step": 1, "processes": 1}
            found |= {"peak_memory_gb": None, "commit": timing.environment()["commit"]}
            (on_gpu.ROOT / command[-1]).write_text(json.dumps(found))

    monkeypatch.setattr(on_gpu, "run", run)
    variants = {name: [name] for name in ("first", "second", "third")}
    on_gpu.compare_trainings("training", variants, 1, minutes=5)
    assert calls == [("first", 5), ("second", 3), ("third", 1)]
    on_gpu.compare_trainings("training", variants, 1, minutes=5)
    assert calls[3:] == [("third", 5)] and on_gpu.table("training").count(" x") == 3
    assert json.loads((tmp_path / "training.json").read_text())["second"]["speedup"] == 2
    on_gpu.compare_trainings("training", variants, 1, minutes=9)  # a finished slice begins again
    assert [name for name, _ in calls[4:]] == ["first", "second", "third"]


@pytest.mark.parametrize("name", on_gpu.EXPERIMENTS)
def test_the_experiments_on_a_gpu_can_be_called(name, monkeypatch):
    calls = []
    monkeypatch.setattr(on_gpu, "run", lambda command, minutes: calls.append(command))
    on_gpu.run_experiment(name, 9, 8)
    comparison = importlib.import_module(f"experiments.{name}").COMPARISON
    arguments = parse_arguments(comparison, "", calls[0][3:])
    assert arguments.steps == on_gpu.EXPERIMENTS[name] == 20 * comparison.steps and arguments.jobs == 8


def test_nothing_is_measured_without_a_gpu(capsys):
    on_gpu.main([])
    assert "no CUDA device" in capsys.readouterr().out


def test_a_training_is_timed(tmp_path, image_folder):
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would find it
    recipe, output = tiny_tokenizer_recipe(tmp_path, image_folder), tmp_path / "result.json"
    training_run.main(["tokenizer", str(recipe), "--steps", "4", "--warmup-steps", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["seconds_per_step"] > 0 and result["images_per_step"] == 2 and result["processes"] == 1


def test_packed_latents_are_measured(tmp_path, monkeypatch, tiny_favae):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(3)]
    datasets.Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / "heldout.parquet")
    monkeypatch.setenv("FAVAE_PHOTOGRAPHS", str(tmp_path))
    tiny_favae.save_pretrained(tmp_path / "vae")
    stored = packed_latents.measure(str(tmp_path / "vae"), 2)["stored"]
    assert stored["bfloat16"]["bytes_ratio"] == pytest.approx(0.5, abs=0.01)
    assert stored["6 bits"]["bytes_ratio"] < 0.11 and stored["6 bits"]["recon_ratio"] == pytest.approx(1, abs=0.02)
    assert stored["float32"]["fd"] > 0 and stored["6 bits"]["fd_ratio"] != 1


def test_muon_is_timed_in_both_precisions(monkeypatch):
    published, dtypes = timm.optim.muon.zeropower_via_newtonschulz, []

    def recorded(*words, dtype, **options):
        dtypes.append(dtype)
        return published(*words, dtype=dtype, **options)

    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", recorded)
    found = muon_step.measure(rounds=1)
    assert found["float32"]["speedup"] > 0
    step = [[dtype] * found["matrices"] for dtype in (torch.bfloat16, torch.float32)]
    assert dtypes == 2 * (step[0] + step[1])


def test_muon_is_timed_with_matrices_together():
    found = muon_step.measure_together(muon_step.VARIANTS["lightningdit"].model, rounds=1)
    assert found["speedup"] == pytest.approx(found["alone_seconds"] / found["together_seconds"])
    assert found["matrices"] > found["shapes"] > 1
