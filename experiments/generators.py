#!/usr/bin/env python
"""Which generator learns the same latents best, and in what order tokens are best learned? On glyphs, from classes.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.generators

LightningDiT, DiT and a UNet learn the latents of one tokenizer (`stock` of experiments/latents.py) by flow matching;
CAT learns them token by token, with its flow head. The indices of three codebooks of about as many bits (`dsl`,
`next_scale` and `next_band` of experiments/codebooks.py) are learned by CAT row by row, scale by scale and band by
band. All have about 4.2 million parameters, and the optimizer and number of steps of experiments/latents.py. Writes
docs/results/generators.json, .md and pictures.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from benchmarks.timing import device, environment
from experiments import glyph_texts, latents
from experiments.glyph_texts import fastest_on_cpu, few_steps, seconds_per_image
from experiments.image_sets import read_images, seams_of
from experiments.latents import save_pictures
from experiments.report import format_table, means, rows_by_model, save_samples
from experiments.rows import Comparison, Task, main
from experiments.training_sets import GLYPHS, TrainingSet, load_images
from favae.autoencoders import spatial_compression_ratio
from favae.files import read_json_lines
from train_generator import train

STEPS = latents.STEPS
GUIDANCE_SCALES = (1.0, 2.0)
CODES, LATENTS = glyph_texts.CODES, glyph_texts.LATENTS
FLOW = {"sample_size": 4, "in_channels": 16}
CAT = {
    "name": "CATTransformerModel",
    "sample_size": 4,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 52,
    "hidden_size": 208,
    "text_dim": None,
    "num_classes": GLYPHS.num_classes,
    "text_dropout_prob": 0.1,
}


@dataclass(frozen=True)
class Variant:
    """A row: a generator, and the tokenizer whose latents or tokens it learns."""

    note: str
    model: dict
    tokenizer: str = CODES
    images: TrainingSet = GLYPHS
    length: float = 1.0


VARIANTS = {
    "lightningdit": Variant(
        "LightningDiT",
        {
            "name": "LightningDiTTransformer2DModel",
            **FLOW,
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 48,
            "num_classes": GLYPHS.num_classes,
        },
        LATENTS,
    ),
    "dit": Variant(
        "diffusers' DiT, with velocities",
        {
            "name": "DiTTransformer2DModel",
            **FLOW,
            "out_channels": 16,
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 46,
            "patch_size": 1,
            "num_embeds_ada_norm": GLYPHS.num_classes,
            "norm_num_groups": 8,
        },
        LATENTS,
    ),
    "unet": Variant(
        "diffusers' UNet, with velocities",
        {
            "name": "UNet2DModel",
            **FLOW,
            "out_channels": 16,
            "block_out_channels": [96, 144],
            "layers_per_block": 1,
            "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"],
            "norm_num_groups": 16,
            "num_class_embeds": GLYPHS.num_classes + 1,
        },
        LATENTS,
    ),
    "cat_flow": Variant(
        "CAT with the flow head, token by token",
        {
            **CAT,
            "attention_head_dim": 48,
            "hidden_size": 192,
            "head": "flow",
            "latent_channels": 16,
            "head_width": 192,
            "head_layers": 2,
        },
        LATENTS,
    ),
    "cat": Variant("CAT on 16 codes of 256, row by row", {**CAT, "codebook_size": 256}),
    "next_scale": Variant(
        "CAT on 1 + 4 + 16 codes of 64, scale by scale",
        {**CAT, "order": "next_scale", "scales": [1, 2, 4], "codebook_size": 64},
        "next_scale",
    ),
    "next_band": Variant(
        "CAT on 16 codes of 256, band by band",
        {
            **CAT,
            "order": "next_band",
            "scales": [1, 2, 4],
            "codebook_size": 256,
            "attention_head_dim": 50,
            "hidden_size": 200,
        },
        "next_band",
    ),
}


def make_row(task: Task) -> dict:
    """Trains one generator with one seed, and measures its samples."""
    tokenizer, cache = glyph_texts.prepare(task, task.steps / STEPS, texts=False)
    train(glyph_texts.generator_config(task, tokenizer, cache))
    pipeline = DiffusionPipeline.from_pretrained(task.run / "final").to(device())
    log = read_json_lines(task.run / "metrics.jsonl")[-1]
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "tokenizer": task.variant.tokenizer}
    row |= {"params": pipeline.transformer.num_parameters()}
    row["loss"] = log["cross_entropy" if "cross_entropy" in log else "velocity"]
    every_class = list(range(GLYPHS.num_classes))
    row["seconds_per_image"] = seconds_per_image(pipeline, class_labels=every_class, guidance_scale=GUIDANCE_SCALES[-1])
    row["samples"] = [{"guidance_scale": scale, **measure(task, pipeline, scale)} for scale in GUIDANCE_SCALES]
    shutil.rmtree(task.run / "checkpoints")
    return row | environment()


def measure(task: Task, pipeline: DiffusionPipeline, scale: float) -> dict[str, float]:
    """FD, IS, precision, recall, how often the character is right, and seams relative to those of real pictures."""
    images, folder = task.variant.images, task.run / f"samples-{scale}"
    samples, metrics = images.sample(pipeline, folder, task.seed, guidance_scale=scale, **few_steps(pipeline))
    patch_size = spatial_compression_ratio(pipeline.vae)
    real = seams_of(load_images(images, "train")[0][:5000], patch_size)
    if task.pictures is not None:
        save_pictures(task, samples)  # guided at last
    return metrics | {"seams": seams_of(read_images(samples), patch_size) / real}


COLUMNS = {"fd": 1, "accuracy": 3, "is": 1, "precision": 2, "recall": 2, "seams": 2}


def tables(report: dict) -> str:
    rows, lines = rows_by_model(report), []
    for number, scale in enumerate(GUIDANCE_SCALES):
        for name, own in rows.items():
            cells = means([row["samples"][number] for row in own], COLUMNS)
            times = [fastest_on_cpu(own, 4) if scale == GUIDANCE_SCALES[-1] else ""]
            lines.append([f"`{name}`", len(own), f"{own[0]['params'] / 1e6:.1f} M", scale, *cells, *times])
    columns = ["FD", "accuracy", "IS", "precision", "recall", "seams", "s/image"]
    return format_table(["row", "seeds", "parameters", "guidance", *columns], lines)


def figures(report: dict, stem: Path) -> None:
    """NAME_samples.png: guided samples of one generator below the other's, each class in a column of its own."""
    save_samples(stem, list(VARIANTS), GLYPHS.size, stem.with_name(f"{stem.name}_samples.png"))


COMPARISON = Comparison(
    name="generators",
    variants=VARIANTS,
    prepare=lambda tasks: GLYPHS.file("train"),
    make_row=make_row,
    tables=tables,
    figures=figures,
    steps=STEPS,
    seeds=1,
    resolution=GLYPHS.size,
    batch_size=glyph_texts.TRAIN["batch_size"],
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
