#!/usr/bin/env python
"""A better decoder for latents that exist, with the generator trained on them left as it is.

    python benchmarks/decoder_only.py --seeds 0     (photographs at 64 px, f8, 16 channels: an hour on a CPU)

First a stock `AutoencoderKL` is trained, and a LightningDiT on its latents. Then, with the encoder frozen and for
equally many further steps, its own decoder and those of `AutoencoderKLFA.from_autoencoder_kl`. Data, optimiser and
measures as in equal_budget.py. At last the generator draws the same latents for each decoder.
Writes docs/results/decoder_only.json, its pictures, and the table in docs/results.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from equal_budget import BAND, PLAIN
from tokenizer_report import MEASURES, save_strips, table, write_section
from tokenizer_runs import ROOT, Experiment, errors, main, throughput
from torchvision.utils import save_image

import favae  # noqa: F401  (makes its pipeline known to diffusers)
from favae.adapters.diffusers import swap_vae
from favae.training.models import find_model_class

OUTPUT = ROOT / "docs/results/decoder_only.json"
RUNS = ROOT / "runs/decoder_only"
PRETRAINED, LATENTS, GENERATOR = RUNS / "pretrained", RUNS / "latents", RUNS / "generator"
STEPS = 2_000  # of the stock autoencoder, and of each decoder afterwards
IMAGES = 270
FROZEN = {"from_autoencoder_kl": str(PRETRAINED / "final")}
OURS = {"name": "AutoencoderKLFA", **FROZEN, "high_block_out_channels": [24, 48, 128]}  # FLOPs within 5%

EXPERIMENTS = {
    "stock": Experiment({"name": "AutoencoderKL", **FROZEN}, "its own decoder, trained on", {"kl": 0.0}),
    "ours": Experiment(OURS, "two branches and an inverse transform, begun with the trained blocks", {"kl": 0.0}),
    "ours_whole": Experiment(
        {**OURS, "low_branch": "image"},
        "the trained decoder, and a high branch that adds to it",
        {"kl": 0.0},
    ),
    "ours_band": Experiment(OURS, "the same, with our loss on the high bands", {"kl": 0.0, **BAND}),
}


def prepare() -> None:
    """The autoencoder and the generator that are there before."""
    recipe = RUNS / "pretrained.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(Experiment(PLAIN, "").recipe(STEPS), sort_keys=False))
    run("train_tokenizer.py", recipe, f"output={PRETRAINED}")
    run("-m", "favae", "cache-latents", "--tokenizer", PRETRAINED / "final", "--data", "photos", "--resolution", 64,
        "--output", LATENTS)  # fmt: skip
    run("train_generator.py", ROOT / "configs/generator/photos_lightningdit.yaml", f"data.latents={LATENTS}",
        f"data.tokenizer={PRETRAINED / 'final'}", f"output={GENERATOR}")  # fmt: skip


def run(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def finish(report: dict, output: Path) -> None:
    # Their frozen encoder is the pretrained one, so the models can only be built where that is.
    report["throughput"] = throughput(EXPERIMENTS, "stock")
    report["before"] = errors(AutoencoderKL.from_pretrained(PRETRAINED / "final").eval(), "heldout")
    report["generator"] = generate(output)
    text = table(report, list(EXPERIMENTS), "stock")
    print(text)
    save_strips(output.with_suffix(""), ["stock", "ours"], output.with_name(f"{output.stem}_reconstructions.png"))
    if output == OUTPUT:
        notes = "\n".join(f"- `{name}`: {experiment.note}" for name, experiment in EXPERIMENTS.items())
        lines = ["| decoder | FD(efficientnet-lite0) | IS(efficientnet-lite0) |", "|---|---|---|"]
        for name, metrics in report["generator"].items():
            lines.append(
                f"| `{name}` | {metrics['FD(efficientnet-lite0)']:.1f} | {metrics['IS(efficientnet-lite0)']:.2f} |"
            )
        recon, low, high = (report["before"][key] for key in MEASURES)
        before = f"The autoencoder before the further steps: Recon {recon:.4f}, Low {low:.4f}, High {high:.5f}."
        write_section("decoder_only", "\n\n".join([text, before, notes, "\n".join(lines)]))


def generate(output: Path) -> dict[str, dict]:
    """The generator with each decoder of the first seed: the measures of the same latents' images."""
    results, rows, drawn = {}, [], None
    for name in EXPERIMENTS:
        pipe = DiffusionPipeline.from_pretrained(GENERATOR / "final")
        pipe.set_progress_bar_config(disable=True)
        vae = find_model_class(EXPERIMENTS[name].model["name"]).from_pretrained(RUNS / f"{name}-0/final")
        swap_vae(pipe, vae)

        def call(output_type: str):
            generator = torch.Generator().manual_seed(0)
            options = {"guidance_scale": 1.5, "num_inference_steps": 20, "generator": generator}
            return pipe(list(range(9)), output_type=output_type, **options).images  # noqa: B023

        latents = call("latent")
        assert drawn is None or torch.equal(latents, drawn), f"{name}: the generator draws other latents"
        drawn = latents
        rows.append(torch.from_numpy(call("np")).permute(0, 3, 1, 2))
        folder = RUNS / f"pipeline-{name}"
        pipe.save_pretrained(folder)
        run("-m", "favae", "evaluate", "generation", "--pipeline", folder, "--reference", "photos",
            "--features", "efficientnet-lite0", "--num-images", IMAGES, "--guidance-scale", 1.5,
            "--num-inference-steps", 20, "--output", RUNS / f"evaluation-{name}")  # fmt: skip
        (row,) = json.loads((RUNS / f"evaluation-{name}/results.json").read_text())["rows"]
        results[name] = row["metrics"]
    save_image(torch.cat(rows), output.with_name(f"{output.stem}_samples.png"), nrow=9, padding=2)
    return results


if __name__ == "__main__":
    if "--worker" not in sys.argv and not (GENERATOR / "final").exists():
        prepare()
    main(__doc__, EXPERIMENTS, OUTPUT, finish, steps=STEPS, seeds=2)
