#!/usr/bin/env python
"""CAT on the emoji: does it need codes or latents, all words of a text or their mean? And LightningDiT beside it.

    python -m experiments.text_to_image         (12 rows on 1,897 emoji at 64 px, 600 or 2,000 steps: hours on a CPU)
    python -m experiments.text_to_image --models codes --seeds 0 --steps 200 --output quick.json

Everything is done by the commands of the recipes: scripts/emoji.py, a tokenizer for each type of tokens (one seed), the
cache of its tokens, the embeddings of the captions, and the generator. Images are made for the names of the 20 held-out
emoji, whose combinations of words no caption in training has, at several guidance scales, and compared with these 20;
and for names of training, and compared with all emoji: Fréchet distance, Inception Score, precision and recall, and how
often the nearest real emoji is the one that was asked for. The controls are the tokenizers' reconstructions, the best
that a generator of their tokens can hope for, and the real images.
Writes docs/results/text_to_image.json, .md and figures; the command that made them is in the JSON file.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from torch import Tensor
from torchvision.utils import save_image

from benchmarks.timing import ROOT, environment
from experiments.emoji import NUM_IMAGES, Emoji, EmojiMetrics, read_emoji, token_statistics
from experiments.image_sets import read_images
from experiments.precision import fastest_precision
from experiments.rows import Comparison, Task, main
from experiments.text_to_image_report import TABLE_SCALE, figures, tables
from experiments.tokenizers import named_means
from favae.autoencoders import load_autoencoder, reconstruct
from favae.data.images import to_uint8
from favae.eval.image_sets import SampleFolder
from favae.eval.reconstruction import image_errors
from favae.eval.sampling import sample_to_folder
from favae.files import read_json_lines
from favae.training.config import load_config
from favae.training.generator_config import GeneratorConfig
from train_generator import train as train_generator

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class TokenType:
    """The recipes of a tokenizer and of the generator of its tokens, and what differs from their models."""

    tokenizer: str
    generator: str
    tokenizer_changes: dict = field(default_factory=dict)
    generator_changes: dict = field(default_factory=dict)


COMPLEMENTS = {"frequency_complement": "conv"}  # as measured; the recipe has none any more
BANDS = {"codebook_size": 512, "quantizer": "next_band"}
BAND_BY_BAND = {"codebook_size": 512, "order": "next_band"}
TOKEN_TYPES = {
    "codes": TokenType("emoji_vqfa", "emoji_cat", COMPLEMENTS),
    "residual": TokenType(
        "emoji_vqfa", "emoji_cat", COMPLEMENTS | {"quantizer": "residual", "num_quantizers": 4}, {"num_quantizers": 4}
    ),
    "latents": TokenType("emoji_favae", "emoji_cat_flow"),
    "raster": TokenType("emoji_vqfa", "emoji_cat"),
    "next_scale": TokenType("emoji_vqfa_scales", "emoji_cat_scales"),
    "next_band": TokenType("emoji_vqfa_scales", "emoji_cat_scales", BANDS, BAND_BY_BAND),
}


@dataclass(frozen=True)
class Variant:
    """A row of the table: the type of tokens, and what differs from the generator of its recipe; or another one."""

    tokens: str
    note: str
    changes: dict = field(default_factory=dict)
    length: float = 1.0
    generator: str | None = None


PUBLISHED = {"attention": "shared_key_value", "relative_position": "true"}
MEAN_OF_WORDS = {"text_pooling": "mean"}
VARIANTS = {
    "codes": Variant("codes", "64 indices of a codebook, attention to the embeddings of all words", length=0.3),
    "codes_sentence": Variant("codes", "the same, attention to the mean of the embeddings alone", MEAN_OF_WORDS, 0.3),
    "codes_published": Variant(
        "codes", "as `codes`, one shared key and value head, relative positions", PUBLISHED, 0.3
    ),
    "codes_long": Variant("codes", "as `codes`, as many steps as `latents`"),
    "codes_long_sentence": Variant("codes", "as `codes_sentence`, as many steps as `latents`", MEAN_OF_WORDS),
    "residual": Variant("residual", "as `codes`, with four residual codes for each token", length=0.3),
    "raster": Variant("raster", "as `codes`, whose tokenizer has no complements: 576 bits row by row", length=0.3),
    "next_scale": Variant("next_scale", "595 bits scale by scale, in four steps", length=0.3),
    "next_band": Variant("next_band", "576 bits band by band, in four steps", length=0.3),
    "latents": Variant(
        "latents", "64 continuous tokens of as many floats, low channels before high ones, by a flow head"
    ),
    "latents_sentence": Variant("latents", "the same, attention to the mean of the embeddings alone", MEAN_OF_WORDS),
    "lightningdit": Variant("latents", "LightningDiT on the same latents, all at once", generator="emoji_lightningdit"),
}


def make_row(task: Task) -> dict:
    """Trains one generator with one seed and measures its images."""
    tokenizer, cache = prepare(task.variant.tokens, task.runs)
    config = generator_config(task, tokenizer, cache)
    train_generator(config)
    log = read_json_lines(task.run / "metrics.jsonl")[-1]

    # Images for held-out names at each guidance scale, and for names of training at one.
    emoji = read_emoji(task.runs)
    metrics = EmojiMetrics(emoji)
    pipeline = DiffusionPipeline.from_pretrained(task.run / "final")
    if task.variant.tokens == "latents":
        steps = "num_head_steps" if config.is_autoregressive else "num_inference_steps"
        options = {steps: config.sampling.num_inference_steps}
    else:
        options = {"top_p": config.sampling.top_p, "temperature": config.sampling.temperature}

    def sample(split: str, scale: float) -> SampleFolder:
        folder = task.run / f"samples-{split}-{scale}"
        prompts = [emoji.names[i][0] for i in emoji.prompted[split]]
        sample_to_folder(pipeline, folder, NUM_IMAGES, prompts=prompts, seed=task.seed, guidance_scale=scale, **options)
        return SampleFolder(folder)

    heldout = {scale: metrics(sample("heldout", scale), "heldout") for scale in GUIDANCE_SCALES}
    if task.pictures is not None and task.seed == 0:
        samples = read_images(sample("heldout", TABLE_SCALE))
        save_pictures(samples[: 2 * len(emoji.heldout)], emoji, task.pictures / f"{task.name}.png")
    return {
        "model": task.name,
        "seed": task.seed,
        "steps": task.steps,
        "mixed_precision": config.train.mixed_precision,
        "params": sum(p.numel() for p in pipeline.transformer.parameters()),
        "loss": log.get("cross_entropy", log.get("velocity")),
        "seconds": log["seconds"],
        "heldout": [{"guidance_scale": scale, **found} for scale, found in heldout.items()],
        "training": metrics(sample("training", TABLE_SCALE), "training"),
        "tokenizer": tokenizer_metrics(task, tokenizer, metrics),
        "heldout_names": [emoji.names[i][0] for i in emoji.heldout],
        "features": metrics.extractor.name,
        **environment(),
    }


def run(*command: str | Path | int) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def prepare(tokens: str, folder: Path) -> tuple[Path, Path]:
    """The tokenizer and the cache of a type of tokens, made if they are not there."""
    data, output, cache = folder / "emoji.parquet", folder / f"{tokens}_tokenizer", folder / f"{tokens}_cache"
    with FileLock(folder / "emoji.lock"):
        if not data.exists():
            run("scripts/emoji.py", "--output", data)
    with FileLock(folder / f"{tokens}.lock"):
        if not (output / "final").exists():
            recipe = f"configs/tokenizer/{TOKEN_TYPES[tokens].tokenizer}.yaml"
            changes = [f"model.{key}={value}" for key, value in TOKEN_TYPES[tokens].tokenizer_changes.items()]
            changes += [f"train.mixed_precision={fastest_precision()}"]
            run("train_tokenizer.py", recipe, f"data.path={data}", f"output={output}", *changes)
        options = ["--data", data, "--resolution", 64, "--output", cache]
        run("-m", "favae", "cache-latents", "--tokenizer", output / "final", *options)  # nothing to do if it is there
        run("-m", "favae", "embed-captions", "--latents", cache, "--encoder", "minilm")
    return output / "final", cache


def generator_config(task: Task, tokenizer: Path, cache: Path) -> GeneratorConfig:
    tokens = TOKEN_TYPES[task.variant.tokens]
    changes = {
        "output": task.run,
        "seed": task.seed,
        "data.latents": cache,
        "data.tokenizer": tokenizer,
        "train.steps": task.steps,
        "train.mixed_precision": fastest_precision(),
        "train.sample_every": 0,
        "train.tracker": "null",
        "train.checkpoints_total_limit": 1,
        **{f"model.{key}": value for key, value in (tokens.generator_changes | task.variant.changes).items()},
    }
    recipe = ROOT / f"configs/generator/{task.variant.generator or tokens.generator}.yaml"
    return load_config(GeneratorConfig, recipe, [f"{key}={value}" for key, value in changes.items()])


@torch.no_grad()
def tokenizer_metrics(task: Task, path: Path, metrics: EmojiMetrics) -> dict:
    """What the tokenizer alone makes of the emoji; measured once for all rows of its type of tokens."""
    tokens, emoji = task.variant.tokens, metrics.emoji
    file = task.runs / f"{tokens}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            tokenizer = load_autoencoder(str(path)).eval()
            batches = (emoji.images / 127.5 - 1).split(64)
            decoded = torch.cat([to_uint8(reconstruct(tokenizer, batch)) for batch in batches])
            found = {"tokens": tokens, **token_statistics(tokenizer, emoji.images[: emoji.num_training])}
            for split, chosen in (("training", slice(emoji.num_training)), ("heldout", emoji.heldout)):
                errors = image_errors(emoji.images[chosen] / 127.5 - 1, decoded[chosen] / 127.5 - 1)
                found[f"errors_{split}"] = named_means(errors)
            file.write_text(json.dumps(found | metrics.both(decoded) | {"real": metrics.both(emoji.images)}))
            if task.pictures is not None:
                save_pictures(decoded[emoji.heldout], emoji, task.pictures / f"{tokens}-reconstructions.png")
                save_pictures(emoji.images[emoji.heldout], emoji, task.pictures / "real.png")
    return json.loads(file.read_text())


def save_pictures(images: Tensor, emoji: Emoji, file: Path) -> None:
    """Writes images (M, 3, H, W), uint8, with one column for each held-out name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(images / 255, file, nrow=len(emoji.heldout), padding=1)


COMPARISON = Comparison(
    name="text_to_image",
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=2_000,
    seeds=1,
    figures=figures,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
