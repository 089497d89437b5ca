#!/usr/bin/env python
"""Does CAT need all words of a text, or their mean? Does it learn them as LightningDiT does? On glyphs and attributes.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.glyph_texts

CAT learns the codes of one tokenizer (`dsl` of experiments/codebooks.py) from "small blue bold digit 7 on a white
ground, top left" and the like, by attention to the embeddings of all tokens of the text, or to their mean alone. On the
latents of another (`stock` of experiments/latents.py), CAT's flow head is compared with a LightningDiT of as many
parameters, which has all tokens of an image at once.
Samples for texts of held-out families, and for pairs of color and character that no text in training has, are read by
the classifier of experiments/glyphs.py: the share in which each attribute is the one that was asked for. Writes
docs/results/glyph_texts.json and .md.
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from filelock import FileLock
from torchvision.utils import save_image

from benchmarks.timing import device, environment, synchronize
from experiments import codebooks, latents
from experiments.glyphs import ATTRIBUTES, accuracies, load_glyphs, trained_classifier
from experiments.image_sets import read_images
from experiments.latents import BOTH
from experiments.report import format_table, means, rows_by_model
from experiments.rows import Comparison, Task, load_recipe, main
from experiments.training_sets import GLYPHS
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import load_tokenizer
from favae.data.text_embeddings import write_text_embeddings
from favae.eval.image_sets import SampleFolder
from favae.eval.sampling import sample_to_folder
from favae.files import read_json_lines
from favae.text_encoder import TextEncoder
from favae.training.generator_config import GeneratorConfig
from train_generator import train as train_generator
from train_tokenizer import train as train_tokenizer

STEPS = 6_000
PROMPTS = 960  # of each split
SPLITS = {"heldout": "texts of other fonts", "combinations": "new pairs of color and character"}
GUIDANCE_SCALES = (1.0, 3.0)
PICTURED = 48
MODEL = {
    "name": "CATTransformerModel",
    "sample_size": 4,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "hidden_size": 192,
    "text_dim": 384,
    "codebook_size": codebooks.MODEL["codebook_size"],
    "text_dropout_prob": 0.1,
}
TRAIN = {**latents.GENERATOR, "batch_size": 64}


CODES, LATENTS = "dsl", "stock"  # the tokenizers
FLOW = {**MODEL, "head": "flow", "latent_channels": 16, "head_width": 192, "head_layers": 2}
del FLOW["codebook_size"]
LIGHTNINGDIT = {
    "name": "LightningDiTTransformer2DModel",
    "sample_size": 4,
    "in_channels": 16,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 44,
    "num_classes": 0,
    "text_dim": 384,
    "text_dropout_prob": 0.1,
}


@dataclass(frozen=True)
class Variant:
    """A row: a generator, and the tokenizer whose tokens it learns."""

    note: str
    model: dict = field(default_factory=lambda: MODEL)
    tokenizer: str = CODES
    length: float = 1.0


VARIANTS = {
    "tokens": Variant("attention to the embeddings of all tokens of the text"),
    "mean": Variant("attention to their mean alone", MODEL | {"text_pooling": "mean"}),
    "tokens_flow": Variant("`tokens`, on continuous latents", FLOW, LATENTS),
    "lightningdit": Variant("LightningDiT, on the same latents", LIGHTNINGDIT, LATENTS),
}


def make_row(task: Task) -> dict:
    """Trains one generator with one seed, and reads what it makes of texts."""
    tokenizer, cache = prepare(task, task.steps / STEPS)
    train_generator(generator_config(task, tokenizer, cache))
    pipeline = DiffusionPipeline.from_pretrained(task.run / "final").to(device())
    log = read_json_lines(task.run / "metrics.jsonl")[-1]
    params = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    loss = log["cross_entropy" if "cross_entropy" in log else "velocity"]
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "params": params, "loss": loss}
    row["seconds"] = log["seconds"]
    prompts = ["large red bold letter Q"] * PICTURED
    row["seconds_per_image"] = seconds_per_image(pipeline, prompt=prompts, guidance_scale=GUIDANCE_SCALES[-1])
    for split in SPLITS:
        row[split] = [{"guidance_scale": scale, **measure(task, pipeline, split, scale)} for scale in GUIDANCE_SCALES]
    shutil.rmtree(task.run / "checkpoints")
    return row | environment()


def few_steps(pipeline: DiffusionPipeline) -> dict[str, int]:
    """The argument of a pipeline of flow matching for the number of steps; CAT's flow head has as many by default."""
    return {"num_inference_steps": latents.NUM_INFERENCE_STEPS} if hasattr(pipeline, "scheduler") else {}


def seconds_per_image(pipeline: DiffusionPipeline, **options: Any) -> float:
    """The time of sampling the latents of one batch with these options, of the second of two."""
    for _ in range(2):
        start = time.perf_counter()
        latent = pipeline(**options, **few_steps(pipeline), output_type="latent").images
        synchronize()
        seconds = time.perf_counter() - start
    return seconds / len(latent)


def fastest_on_cpu(rows: list[dict], digits: int) -> str:
    """The least seconds per image of the rows that were not measured on a GPU; empty if there are none."""
    times = [row["seconds_per_image"] for row in rows if row["hardware"]["gpu"] is None]
    return f"{min(times):.{digits}f}" if times else ""


def measure(task: Task, pipeline: DiffusionPipeline, split: str, scale: float) -> dict:
    """How often each attribute, and all of them, are as the text says; and FD, IS, precision and recall."""
    table = datasets.Dataset.from_parquet(str(GLYPHS.file(split)))
    chosen = np.linspace(0, len(table) - 1, min(PROMPTS, len(table))).astype(int)
    prompts = [table["caption"][int(i)] for i in chosen]
    folder = task.run / f"samples-{split}-{scale}"
    options = {"guidance_scale": scale, "batch_size": 120, **few_steps(pipeline)}
    sample_to_folder(pipeline, folder, len(prompts), prompts=prompts, seed=task.seed, **options)
    samples = SampleFolder(folder)
    attributes = {name: values[chosen] for name, values in load_glyphs(split)[1].items()}
    if task.pictures is not None and task.seed == 0:
        task.pictures.mkdir(parents=True, exist_ok=True)
        picture = task.pictures / f"{task.name}-{split}-{scale}.png"
        save_image(read_images(samples)[:PICTURED] / 255, picture, nrow=12, padding=1)
    found = accuracies(trained_classifier(), read_images(samples), attributes)
    return {"attributes": found, **GLYPHS.metrics(samples, attributes["label"])}


def prepare(task: Task, longer: float, *, texts: bool = True) -> tuple[Path, Path]:
    """The tokenizer, and the cache of its tokens, with the embeddings of captions or not; made once for each seed.

    The tokenizer is that of a row with this seed of another experiment, if that has left it in the folder beside
    `task.runs`; it is trained so many times longer than there by default.
    """
    name = task.variant.tokenizer
    module, recipe = (latents, latents.tokenizer_config) if name == LATENTS else (codebooks, codebooks.recipe)
    runs = task.runs.with_name(module.COMPARISON.name)
    steps = round(longer * module.STEPS)
    own = Task(name, module.VARIANTS[name], task.seed, steps, runs, task.resolution, task.batch_size)
    runs.mkdir(parents=True, exist_ok=True)
    cache = task.runs / f"cache-{name}-{task.seed}-{steps}"
    with FileLock(own.beside(".lock")):
        if not (own.run / "final").exists():
            train_tokenizer(recipe(own))
            AcceleratorState._reset_state()  # the generator trains in another precision
        tokenizer = load_tokenizer(str(own.run / "final"))
        write_latent_cache(tokenizer, GLYPHS.dataset("train"), cache, data_name="glyphs", batch_size=256)
        if texts:
            write_text_embeddings(TextEncoder("minilm"), cache, batch_size=256)
    return own.run / "final", cache


def generator_config(task: Task, tokenizer: Path, cache: Path) -> GeneratorConfig:
    every = {"log_every": task.steps // 20, "checkpoint_every": task.steps}
    sections = {
        "model": task.variant.model,
        "data": {"latents": str(cache), "tokenizer": str(tokenizer), "flip": False},
        "train": {**TRAIN, **BOTH, **every, "steps": task.steps},
    }
    return load_recipe(GeneratorConfig, task, sections)


def tables(report: dict) -> str:
    rows, lines = rows_by_model(report), []
    for split, note in SPLITS.items():
        for number, scale in enumerate(GUIDANCE_SCALES):
            for name, own_rows in rows.items():
                own = [row[split][number] for row in own_rows]
                cells = means([entry["attributes"] for entry in own], dict.fromkeys(ATTRIBUTES, 3))
                seconds = fastest_on_cpu(own_rows, 3) if scale == GUIDANCE_SCALES[-1] else ""
                cells += [*means(own, {"fd": 1}), seconds]
                lines.append([f"`{name}`", len(own), note, scale, *cells])
    return format_table(["row", "seeds", "texts", "guidance", *ATTRIBUTES, "FD", "s/image"], lines)


COMPARISON = Comparison(
    name="glyph_texts",
    variants=VARIANTS,
    prepare=lambda tasks: GLYPHS.file("train"),
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=2,
    resolution=GLYPHS.size,
    batch_size=64,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
