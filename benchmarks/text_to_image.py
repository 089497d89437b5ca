#!/usr/bin/env python
"""CAT on the emoji: codes against continuous latents of as many floats, all words of a text against their mean.

    python benchmarks/text_to_image.py          (1,897 emoji at 64 px: hours on a CPU)
    python benchmarks/text_to_image.py --models codes --seeds 0 --steps 200 --output quick.json

Everything is done by the commands of the recipes: scripts/emoji.py, a tokenizer of each kind (one seed), the cache of
its tokens, the states of the captions, and CAT. Images are drawn for the names of the 20 held-out emoji, whose
combinations no caption in training has, at several scales of guidance, and compared with these 20; and for names of
training, compared with all real emoji: Frechet distance, Inception score, precision and recall, and retrieval, whether
the nearest of all real emoji is what the text asked for. The tokenizers' reconstructions and the real images say what
is the best that can be had.
Writes docs/results/text_to_image.json, its figures, and the tables of docs/results.md.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from generator_quality import Images
from tokenizer_report import by_model, with_spread, write_section
from tokenizer_runs import ROOT, environment, main, named_means
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image

from favae.autoencoders import load_autoencoder, measure_budget, reconstruct
from favae.data.images import ImageDataset, to_uint8
from favae.data.sources import open_source
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import generation_metrics
from favae.eval.image_sets import CroppedImages, SampleFolder
from favae.eval.metrics import retrieval
from favae.eval.reconstruction import image_errors
from favae.eval.sampling import sample_to_folder
from favae.training.config import GeneratorConfig, load_config
from train_generator import train as train_generator

OUTPUT = ROOT / "docs/results/text_to_image.json"
FEATURES = "efficientnet-lite0"
IMAGES = 320  # 16 for each held-out name, and as many for names in training
GUIDANCE = (1.0, 2.0, 3.0, 5.0)
SHOWN = 3.0  # the scale of the tables
TOP = (1, 5)


@dataclass
class Tokens:
    """A kind of tokens: the recipes of a tokenizer and of CAT on it, and what differs from their models."""

    tokenizer: str
    generator: str
    tokenizer_changes: dict = field(default_factory=dict)
    generator_changes: dict = field(default_factory=dict)


KINDS = {
    "codes": Tokens("emoji_vqfa", "emoji_cat"),
    "residual": Tokens(
        "emoji_vqfa", "emoji_cat", {"quantizer": "residual", "num_quantizers": 4}, {"num_quantizers": 4}
    ),
    "latents": Tokens("emoji_favae", "emoji_cat_flow"),
}


@dataclass
class Row:
    """A row of the table: the kind of tokens, and what differs from their transformer."""

    tokens: str
    note: str
    changes: dict = field(default_factory=dict)
    length: float = 1.0


PUBLISHED = {"attention": "shared_key_value", "relative_position": "true"}
SENTENCE = {"text_pooling": "mean"}
EXPERIMENTS = {
    "codes": Row("codes", "64 indices of a codebook, attention to all token states of the text", length=0.3),
    "codes_sentence": Row("codes", "the same, attention to the mean of the states alone", SENTENCE, 0.3),
    "codes_published": Row("codes", "as `codes`, one shared key and value head, relative positions", PUBLISHED, 0.3),
    "codes_long": Row("codes", "as `codes`, as many steps as `latents`"),
    "codes_long_sentence": Row("codes", "as `codes_sentence`, likewise", SENTENCE),
    "residual": Row("residual", "as `codes`, with four residual codes for each token", length=0.3),
    "latents": Row("latents", "64 continuous tokens of as many floats, low channels before high ones, by a flow head"),
    "latents_sentence": Row("latents", "the same, attention to the mean of the states alone", SENTENCE),
}


@dataclass
class Emoji:
    """All real emoji, those of training first.

    Attributes:
        images: (N, 3, 64, 64), uint8. names: all captions of each. categories: N. training: how many are of training.
    """

    images: Tensor
    names: list[list[str]]
    categories: list[str]
    training: int

    @property
    def heldout(self) -> list[int]:
        return list(range(self.training, len(self.images)))

    @property
    def asked(self) -> dict[str, list[int]]:
        """For each set of samples, the emoji by whose first names they are asked for."""
        heldout = [self.heldout[i % len(self.heldout)] for i in range(IMAGES)]
        return {"heldout": heldout, "training": [i * self.training // IMAGES for i in range(IMAGES)]}


def run(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def prepare(kind: str, folder: Path) -> tuple[Path, Path]:
    """The tokenizer and the cache of a kind of tokens, made if they are not there."""
    data, output, cache = folder / "emoji.parquet", folder / f"{kind}_tokenizer", folder / f"{kind}_cache"
    with FileLock(folder / "emoji.lock"):
        if not data.exists():
            run("scripts/emoji.py", "--output", data)
    with FileLock(folder / f"{kind}.lock"):
        if not (output / "final").exists():
            recipe = f"configs/tokenizer/{KINDS[kind].tokenizer}.yaml"
            changes = [f"model.{key}={value}" for key, value in KINDS[kind].tokenizer_changes.items()]
            run("train_tokenizer.py", recipe, f"data.path={data}", f"output={output}", *changes)
        options = ["--data", data, "--resolution", 64, "--output", cache]
        run("-m", "favae", "cache-latents", "--tokenizer", output / "final", *options)  # nothing to do if it is there
        run("-m", "favae", "embed-captions", "--latents", cache, "--encoder", "minilm")
    return output / "final", cache


def read_emoji(folder: Path) -> Emoji:
    images, names, categories, counts = [], [], [], []
    for file in ("emoji.parquet", "emoji_heldout.parquet"):
        source = open_source(str(folder / file))
        cropped = CroppedImages(ImageDataset(source, 64, crop="center", flip=False))
        images += [cropped[i]["image"] for i in range(len(source))]
        names += [source.captions(i) for i in range(len(source))]
        categories += [source.classes[source.label(i)] for i in range(len(source))]
        counts.append(len(source))
    return Emoji(torch.stack(images), names, categories, counts[0])


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def retrieved(features, asked: list[int], emoji: Emoji, gallery) -> dict:
    """Rates and what chance would give, of samples that were asked for by the first names of these emoji.

    Args:
        features: (M, D) of the samples. gallery: (N, D) of all real emoji.
    """
    everything = list(range(len(emoji.images)))
    galleries = {
        "name": ([[emoji.names[i][0] in emoji.names[k] for k in everything] for i in asked], everything),
        "category": ([[emoji.categories[i] == emoji.categories[k] for k in everything] for i in asked], everything),
    }
    if set(asked) <= set(emoji.heldout):
        galleries["among_heldout"] = ([[i == k for k in emoji.heldout] for i in asked], emoji.heldout)
    found = {"chance": {}}
    for name, (relevant, chosen) in galleries.items():
        rates, chance = retrieval(features, gallery[chosen], relevant, TOP)
        found[name], found["chance"][name] = ({f"top{k}": value for k, value in x.items()} for x in (rates, chance))
    return found


class Judge:
    """Measures sets of images by one extractor against the real emoji, whose features are kept in the folder."""

    def __init__(self, folder: Path):
        self.emoji, self.extractor = read_emoji(folder), FeatureExtractor(FEATURES)
        file = folder / "references.pt"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                sets = {"training": self.emoji.images, "heldout": self.emoji.images[self.emoji.heldout]}
                torch.save({name: self.statistics(Images(images)) for name, images in sets.items()}, file)
        self.references: dict[str, ImageStatistics] = torch.load(file, weights_only=False)  # our own file

    def statistics(self, images: Dataset) -> ImageStatistics:
        return image_statistics(images, [self.extractor], logits=True)[0]

    def __call__(self, images: Dataset, kind: str) -> dict:
        """Of images that were asked for by names held out, against these 20 emoji; or of training, against all."""
        found = self.statistics(images)
        metrics = generation_metrics(found, self.references[kind])
        kept = {name.lower(): metrics[self.extractor.metric(name)] for name in ("FID", "IS", "precision", "recall")}
        return kept | retrieved(found.kept, self.emoji.asked[kind], self.emoji, self.references["training"].kept)

    def both(self, images: Tensor) -> dict:
        """Of all emoji, changed in some way, each taken as if it had been asked for."""
        return {kind: self(Images(images[asked]), kind) for kind, asked in self.emoji.asked.items()}


@torch.no_grad()
def about_tokens(tokenizer, images: Tensor) -> dict:
    """How much a tokenizer's tokens of some images hold; of several codebooks, means over them."""
    batches = (images / 127.5 - 1).split(64)
    latents = tokenizer.encode(batches[0][:1])
    if not hasattr(tokenizer, "num_tokens"):
        nats = torch.cat([tokenizer.encode(batch).latent_dist.kl() for batch in batches])
        return {"floats": latents.latent_dist.mean.numel(), "bits": float(nats.mean() / math.log(2))}
    indices = torch.cat([tokenizer.quantize(tokenizer.encode(batch).latents).indices for batch in batches])
    codebooks = indices.flatten(1, 2).flatten(0, 1).view(-1, indices[0, 0, 0].numel()).T  # (Q, all tokens)
    shares = torch.stack([torch.bincount(x, minlength=tokenizer.num_tokens) / x.numel() for x in codebooks])
    entropies = -(shares * shares.clamp_min(1e-12).log()).sum(dim=1)
    return {
        "floats": latents.latents.numel(),
        "bits": measure_budget(tokenizer, images.shape[-1]).bits_per_image,
        "codes_used": float((shares > 0).sum(dim=1).float().mean()),
        "perplexity": float(entropies.exp().mean()),
    }


@torch.no_grad()
def about_tokenizer(kind: str, path: Path, judge: Judge, folder: Path, pictures: Path | None) -> dict:
    """What the tokenizer alone makes of the emoji; once for all rows of its kind."""
    file, emoji = folder / f"{kind}.json", judge.emoji
    with FileLock(folder / f"{kind}.lock"):
        if not file.exists():
            tokenizer = load_autoencoder(str(path)).eval()
            batches = emoji.images.split(64)
            decoded = torch.cat([to_uint8(reconstruct(tokenizer, batch / 127.5 - 1)) for batch in batches])
            found = {"kind": kind, **about_tokens(tokenizer, emoji.images[: emoji.training])}
            for name, chosen in (("training", slice(emoji.training)), ("heldout", emoji.heldout)):
                both = (images[chosen] / 127.5 - 1 for images in (emoji.images, decoded))
                found[f"errors_{name}"] = named_means(image_errors(*both))
            file.write_text(json.dumps(found | judge.both(decoded) | {"real": judge.both(emoji.images)}))
            if pictures is not None:
                save_rows(f"{kind}-reconstructions", decoded[emoji.heldout], emoji, pictures)
                save_rows("real", emoji.images[emoji.heldout], emoji, pictures)
    return json.loads(file.read_text())


def run_row(name: str, experiment: Row, seed: int, steps: int, folder: Path, pictures: Path | None) -> dict:
    """One generator of one seed, trained and measured."""
    folder = folder.resolve()
    path, cache = prepare(experiment.tokens, folder)
    output, kind = folder / f"{name}-{seed}", KINDS[experiment.tokens]
    changes = {"output": output, "seed": seed, "data.latents": cache, "data.tokenizer": path, "train.steps": steps}
    changes |= {"train.sample_every": 0, "train.tracker": "null", "train.checkpoints_total_limit": 1}
    changes |= {f"model.{key}": value for key, value in (kind.generator_changes | experiment.changes).items()}
    recipe = ROOT / f"configs/generator/{kind.generator}.yaml"
    config = load_config(GeneratorConfig, recipe, [f"{key}={value}" for key, value in changes.items()])
    train_generator(config)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])

    judge = Judge(folder)
    emoji = judge.emoji
    pipeline = DiffusionPipeline.from_pretrained(output / "final")
    options = {"top_p": config.sampling.top_p, "temperature": config.sampling.temperature}
    if experiment.tokens == "latents":
        options = {"num_head_steps": config.sampling.num_inference_steps}

    def drawn(kind: str, scale: float) -> SampleFolder:
        where = output / f"samples-{kind}-{scale}"
        prompts = [emoji.names[i][0] for i in emoji.asked[kind]]
        sample_to_folder(pipeline, where, IMAGES, prompts=prompts, seed=seed, guidance_scale=scale, **options)
        return SampleFolder(where)

    if pictures is not None and seed == 0:
        samples = drawn("heldout", SHOWN)
        save_rows(name, torch.stack([samples[i]["image"] for i in range(2 * len(emoji.heldout))]), emoji, pictures)
    return {
        "model": name,
        "seed": seed,
        "steps": steps,
        "params": sum(p.numel() for p in pipeline.transformer.parameters()),
        "loss": last.get("cross_entropy", last.get("velocity")),
        "seconds": last["seconds"],
        "heldout": [{"guidance_scale": scale, **judge(drawn("heldout", scale), "heldout")} for scale in GUIDANCE],
        "training": judge(drawn("training", SHOWN), "training"),
        "tokenizer": about_tokenizer(experiment.tokens, path, judge, folder, pictures),
        "heldout_names": [emoji.names[i][0] for i in emoji.heldout],
        "features": judge.extractor.name,
        **environment(),
    }


def save_rows(label: str, images: Tensor, emoji: Emoji, folder: Path) -> None:
    """Images (M, 3, H, W), uint8, one column for each held-out name."""
    folder.mkdir(parents=True, exist_ok=True)
    save_image(images / 255, folder / f"{label}.png", nrow=len(emoji.heldout), padding=1)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def finish(report: dict, output: Path) -> None:
    text = tables(report)
    print(text)
    save_sweep(report, output.with_name(f"{output.stem}_guidance.png"))
    save_grid(report, output)
    if output == OUTPUT:
        shown = by_model(report)
        notes = [f"- `{name}`: {experiment.note}" for name, experiment in EXPERIMENTS.items() if name in shown]
        write_section("text_to_image", "\n".join([text, "", *notes]))


def at_scale(row: dict, scale: float = SHOWN) -> dict:
    (found,) = (point for point in row["heldout"] if point["guidance_scale"] == scale)
    return found


def tables(report: dict) -> str:
    """Markdown: the tokens, held-out names, names of training."""
    rows = by_model(report)
    rows = {name: rows[name] for name in EXPERIMENTS if name in rows}
    kinds = {own[0]["tokenizer"]["kind"]: own[0]["tokenizer"] for own in rows.values()}
    real = next(iter(kinds.values()))["real"]

    tokens = [_line("tokens", "floats", "bits", "codes used, perplexity", "Recon, training", "Recon, PSNR, held out")]
    for kind, about in kinds.items():
        used = f"{about['codes_used']:.0f}, {about['perplexity']:.0f}" if "perplexity" in about else ""
        bits = f"{about['bits']:,.0f}" if used else f"{about['bits']:,.0f} (KL to a normal distribution)"
        heldout = f"{about['errors_heldout']['recon']:.4f}, {about['errors_heldout']['psnr']:.1f}"
        tokens.append(
            _line(f"`{kind}`", about["floats"], bits, used, f"{about['errors_training']['recon']:.4f}", heldout)
        )

    found = [tokens]
    quality = ["FD", "IS", "precision, recall"]
    for title, galleries in (
        ("held-out names", {"among_heldout": "among the 20", "name": "name", "category": "category"}),
        ("names of training", {"name": "name", "category": "category"}),
    ):
        kind = "heldout" if title.startswith("held") else "training"
        lines = [_line(title, "seeds", "parameters", *quality, *galleries.values())]
        for name, own in rows.items():
            points = [at_scale(row) if kind == "heldout" else row[kind] for row in own]
            cells = [len(own), f"{own[0]['params'] / 1e6:.1f} M", *_quality(points)]
            lines.append(_line(f"`{name}`", *cells, *(_rate(points, gallery) for gallery in galleries)))
        ceilings = {f"reconstructions, `{name}`": about[kind] for name, about in kinds.items()}
        for name, point in (ceilings | {"the real images": real[kind]}).items():
            cells = ["", "", *_quality([point]), *(_rate([point], gallery) for gallery in galleries)]
            lines.append(_line(name, *cells))
        lines.append(_line("chance", *[""] * 5, *(_rate([real[kind]["chance"]], gallery) for gallery in galleries)))
        found.append(lines)
    heads = (["|" + "---|" * (lines[0].count("|") - 1)] for lines in found)
    return "\n\n".join("\n".join([lines[0], *head, *lines[1:]]) for lines, head in zip(found, heads))


def _line(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _rate(points: list[dict], gallery: str) -> str:
    """The rates of the first and the first five, in percent, mean and spread over seeds."""
    return ", ".join(with_spread([100 * point[gallery][f"top{k}"] for point in points], 0) for k in TOP)


def _quality(points: list[dict]) -> list[str]:
    values = {key: [point[key] for point in points] for key in ("fid", "is", "precision", "recall")}
    shares = ", ".join(with_spread(values[key], 2) for key in ("precision", "recall"))
    return [with_spread(values["fid"], 0), with_spread(values["is"], 2), shares]


def save_sweep(report: dict, file: Path) -> None:
    """FD and retrieval over the scale of guidance, a line for each seed; held-out names."""
    kinds = {
        f"FD({FEATURES}) to the 20": lambda point: point["fid"],
        "nearest of the 20 is the one asked for": lambda point: point["among_heldout"]["top1"],
        "nearest of all is of its category": lambda point: point["category"]["top1"],
    }
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 4), constrained_layout=True)
    for axis, (title, value) in zip(axes, kinds.items()):
        for number, (name, rows) in enumerate(by_model(report).items()):
            for i, row in enumerate(rows):
                points = [(point["guidance_scale"], value(point)) for point in row["heldout"]]
                axis.plot(*zip(*points), color=f"C{number}", marker=".", label=None if i else name, alpha=0.8)
        axis.set(title=title, xlabel="guidance scale")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(EXPERIMENTS), fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_grid(report: dict, output: Path) -> None:
    """Real images, reconstructions and samples of every model, one held-out name per column."""
    labels = ["real", *(f"{kind}-reconstructions" for kind in KINDS), *EXPERIMENTS]
    files = {label: output.with_suffix("") / f"{label}.png" for label in labels}
    pictures = {label: plt.imread(file) for label, file in files.items() if file.exists()}
    if not pictures:  # of the first seed alone
        return
    names = report["rows"][0]["heldout_names"]
    heights = [picture.shape[0] for picture in pictures.values()]
    size = {"figsize": (17, 1.5 + 0.013 * sum(heights)), "constrained_layout": True, "squeeze": False}
    figure, axes = plt.subplots(len(pictures), 1, height_ratios=heights, **size)
    for axis, (label, picture) in zip(axes[:, 0], pictures.items()):
        axis.imshow(picture, interpolation="nearest")
        axis.set(yticks=[], xticks=[])
        axis.set_ylabel(label.replace("-", "\n").replace("_", "\n"), rotation=0, ha="right", va="center")
    step, top = picture.shape[1] / len(names), axes[0, 0]
    top.set_xticks([step * (k + 0.5) for k in range(len(names))], names, rotation=35, ha="left", fontsize=8)
    top.xaxis.tick_top()
    figure.savefig(output.with_name(f"{output.stem}_samples.png"), dpi=100, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main(__doc__, EXPERIMENTS, OUTPUT, finish, steps=2_000, seeds=1, run=run_row, sizes=False)
