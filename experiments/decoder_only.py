#!/usr/bin/env python
"""Does a wavelet decoder improve latents that exist, with the generator trained on them left as it is?

    python -m experiments.decoder_only --seeds 0       (photographs at 64 px, f8, 16 channels: an hour on 2 CPU cores)

First a stock `AutoencoderKL` is trained, and a LightningDiT on its latents. Then, with the encoder frozen and for as
many steps again, a decoder. The control is `stock`, the autoencoder's own decoder trained on. Data, optimizer and
metrics are those of experiments/equal_budget.py. At last the generator makes images from the same latents with each
decoder. Writes docs/results/decoder_only.json, .md and figures; the command above made them.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from filelock import FileLock
from torch import Tensor
from torchvision.utils import save_image

from benchmarks.timing import ROOT
from experiments import tokenizers
from experiments.equal_budget import HIGH_BAND_LOSS, PLAIN
from experiments.report import format_table, full_table, save_strips, short_table
from experiments.rows import Comparison, Task, main
from experiments.tokenizers import Variant, compare_speed, load_photos, mean_errors
from favae.adapters.pipelines import swap_vae
from favae.training.models import find_model_class

RUNS = ROOT / "runs/decoder_only"
PRETRAINED, LATENTS, GENERATOR = RUNS / "pretrained", RUNS / "latents", RUNS / "generator"
STEPS = 2_000  # of the stock autoencoder, and of each decoder afterwards
NUM_IMAGES = 270
SAMPLING = {"guidance_scale": 1.5, "num_inference_steps": 20}
FROZEN = {"from_autoencoder_kl": str(PRETRAINED / "final")}
WAVELET = {"name": "AsymmetricAutoencoderKLFA", **FROZEN, "high_block_out_channels": [24, 48, 128]}  # FLOPs within 5 %

VARIANTS = {
    "stock": Variant({"name": "AutoencoderKL", **FROZEN}, "its own decoder, trained on", {"kl": 0.0}),
    "ours": Variant(WAVELET, "two branches and an inverse transform, started from the trained blocks", {"kl": 0.0}),
    "ours_band": Variant(WAVELET, "the same, with our loss on the high bands", {"kl": 0.0, **HIGH_BAND_LOSS}),
}


def make_row(task: Task) -> dict:
    """Trains one decoder; before that, the autoencoder and the generator if they are not there."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / "pretrained.lock"):
        prepare()
    return tokenizers.make_row(replace(task, runs=RUNS))  # where `finish` looks for the decoders


def prepare() -> None:
    """Trains the autoencoder whose latents exist, and the generator on them."""
    if not (PRETRAINED / "final").exists():
        recipe = PRETRAINED.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(Variant(PLAIN, "").recipe(STEPS), sort_keys=False))
        run("train_tokenizer.py", recipe, f"output={PRETRAINED}")
    if not (GENERATOR / "final").exists():
        run("-m", "favae", "cache-latents", "--tokenizer", PRETRAINED / "final", "--data", "photos", "--resolution", 64,
            "--output", LATENTS)  # fmt: skip
        run("train_generator.py", "configs/generator/photos_lightningdit.yaml", f"data.latents={LATENTS}",
            f"data.tokenizer={PRETRAINED / 'final'}", f"output={GENERATOR}")  # fmt: skip


def run(*command: str | Path | float) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def finish(report: dict, stem: Path) -> None:
    """Adds the models' speed, the pretrained autoencoder's errors, and the generator's images with each decoder.

    The models can only be built where the pretrained autoencoder is, whose encoder they hold.
    """
    report["speed"] = compare_speed(VARIANTS, "stock", report["resolution"])
    pretrained = AutoencoderKL.from_pretrained(PRETRAINED / "final").eval()
    report["before"] = mean_errors(pretrained, load_photos("heldout", report["resolution"]))
    images, report["generator"], sampled = [], {}, None
    steps = {row["model"]: row["steps"] for row in report["rows"] if row["seed"] == 0}
    for name, variant in ((name, variant) for name, variant in VARIANTS.items() if name in steps):
        pipeline = DiffusionPipeline.from_pretrained(GENERATOR / "final")
        pipeline.set_progress_bar_config(disable=True)
        swap_vae(
            pipeline, find_model_class(variant.model["name"]).from_pretrained(RUNS / f"{name}-0-{steps[name]}/final")
        )
        latents = sample(pipeline, "latent")
        assert sampled is None or torch.equal(latents, sampled), f"{name}: the generator samples other latents"
        sampled = latents
        images.append(torch.from_numpy(sample(pipeline, "np")).permute(0, 3, 1, 2))
        report["generator"][name] = evaluate(pipeline, name)
    if images:
        save_image(torch.cat(images), f"{stem}_samples.png", nrow=9, padding=2)


def sample(pipeline: DiffusionPipeline, output_type: str) -> Tensor:
    """One image of each of the nine classes, or its latents; always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(list(range(9)), output_type=output_type, generator=generator, **SAMPLING).images


def evaluate(pipeline: DiffusionPipeline, name: str) -> dict[str, float]:
    """The metrics of the pipeline's images against the training crops."""
    folder, output = RUNS / f"pipeline-{name}", RUNS / f"evaluation-{name}"
    pipeline.save_pretrained(folder)
    run("-m", "favae", "evaluate", "generation", "--pipeline", folder, "--reference", "photos",
        "--features", "efficientnet-lite0", "--num-images", NUM_IMAGES, "--output", output,
        "--guidance-scale", SAMPLING["guidance_scale"],
        "--num-inference-steps", SAMPLING["num_inference_steps"])  # fmt: skip
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    return row["metrics"]


def tables(report: dict) -> str:
    before = report["before"]
    columns = ["FD(efficientnet-lite0)", "IS(efficientnet-lite0)"]
    lines = [
        [f"`{name}`", f"{metrics[columns[0]]:.1f}", f"{metrics[columns[1]]:.2f}"]
        for name, metrics in report["generator"].items()
    ]
    sections = [
        short_table(report, list(VARIANTS), "stock"),
        "The autoencoder before the further steps: "
        f"Recon {before['recon']:.4f}, Low {before['low']:.4f}, High {before['high']:.5f}.",
        format_table(["decoder", *columns], lines),
        "All columns:",
        full_table(report, list(VARIANTS), "stock"),
    ]
    return "\n\n".join(sections)


def figures(report: dict, stem: Path) -> None:
    save_strips(stem, ["stock", "ours"], Path(f"{stem}_reconstructions.png"))


COMPARISON = Comparison(
    name="decoder_only",
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=2,
    finish=finish,
    figures=figures,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
