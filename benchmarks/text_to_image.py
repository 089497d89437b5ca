#!/usr/bin/env python
"""CAT on the emoji: codes against continuous latents of as many floats, all words of a text against their mean.

    python benchmarks/text_to_image.py          (1,897 emoji at 64 px, 2 seeds: hours on a CPU)
    python benchmarks/text_to_image.py --models codes --seeds 0 --steps 200 --output quick.json

Everything is done by the commands of the recipes: scripts/emoji.py, a tokenizer of each kind (one seed), the cache of
its tokens, the states of the captions, and CAT. Images are drawn for the names of the 20 held-out emoji, whose
combinations no caption in training has, at several scales of guidance, and for names that were trained on. They are
compared with all real emoji: Frechet distance, Inception score, precision and recall, and retrieval: whether the
nearest real image is what the text asked for. The tokenizers' reconstructions say what a perfect generator would get.
Writes docs/results/text_to_image.json, its figures, and the tables of docs/results.md.
"""

import json
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
from tokenizer_runs import ROOT, environment, main
from torch import Tensor
from torchvision.utils import save_image

from favae.autoencoders import reconstruct
from favae.data.images import ImageDataset, to_uint8
from favae.data.sources import open_source
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import measure
from favae.eval.image_sets import CroppedImages, SampleFolder
from favae.eval.measures import retrieval
from favae.eval.reconstruction import PER_IMAGE, image_errors
from favae.eval.sampling import sample_to_folder
from favae.training.config import GeneratorConfig, load_config
from favae.training.models import TOKENIZERS
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
    "codes": Row("codes", "64 indices of a codebook, attention to all token states of the text"),
    "codes_sentence": Row("codes", "the same, attention to the mean of the states alone", SENTENCE),
    "latents": Row("latents", "64 continuous tokens of as many floats, low channels before high ones, by a flow head"),
    "latents_sentence": Row("latents", "the same, attention to the mean of the states alone", SENTENCE),
    "residual": Row("residual", "as `codes`, with four residual codes for each token"),
    "codes_published": Row("codes", "one shared key and value head, relative positions: as published", PUBLISHED),
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
    def some_of_training(self) -> list[int]:
        return [i * self.training // IMAGES for i in range(IMAGES)]


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
        run("-m", "favae.data.latents", "--tokenizer", output / "final", *options)  # nothing to do if it is there
        run("-m", "favae.data.text", "--latents", cache, "--encoder", "minilm")
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


def statistics_of(images, extractor: FeatureExtractor) -> ImageStatistics:
    return image_statistics(images, [extractor], logits=True)[0]


def retrieved(features, asked: list[int], emoji: Emoji, real: ImageStatistics) -> dict:
    """Rates and what chance would give, of samples that were asked for by the first names of these emoji."""
    everything = list(range(len(emoji.images)))
    galleries = {
        "name": ([[emoji.names[i][0] in emoji.names[k] for k in everything] for i in asked], everything),
        "category": ([[emoji.categories[i] == emoji.categories[k] for k in everything] for i in asked], everything),
    }
    if set(asked) <= set(emoji.heldout):
        galleries["among_heldout"] = ([[i == k for k in emoji.heldout] for i in asked], emoji.heldout)
    found = {"chance": {}}
    for name, (relevant, gallery) in galleries.items():
        rates, chance = retrieval(features, real.kept[gallery], relevant, TOP)
        found[name], found["chance"][name] = ({f"top{k}": value for k, value in x.items()} for x in (rates, chance))
    return found


def measures(images, asked: list[int], emoji: Emoji, real: ImageStatistics, extractor: FeatureExtractor) -> dict:
    """Of images, the i-th of which was asked for by the name of emoji asked[i]."""
    found = statistics_of(images, extractor)
    metrics = measure(found, real)
    kept = {name.lower(): metrics[extractor.metric(name)] for name in ("FID", "IS", "precision", "recall")}
    return kept | retrieved(found.kept, asked, emoji, real)


def errors(images: Tensor, decoded: Tensor) -> dict[str, float]:
    """Means over images (uint8) of what is measured image by image."""
    means = image_errors(images / 127.5 - 1, decoded / 127.5 - 1).double().mean(dim=0)
    return {name.lower(): value for name, value in zip(PER_IMAGE, means.tolist()) if value == value}


@torch.no_grad()
def about_tokens(tokenizer, images: Tensor) -> dict:
    """How much a tokenizer's tokens of the training images hold."""
    batches = (images / 127.5 - 1).split(64)
    if hasattr(tokenizer, "num_tokens"):
        indices = torch.cat([tokenizer.quantize(tokenizer.encode(batch).latents).indices for batch in batches])
        share = torch.bincount(indices.flatten(), minlength=tokenizer.num_tokens) / indices.numel()
        used, entropy = int((share > 0).sum()), -(share * share.clamp_min(1e-12).log()).sum()
        bits = indices[0].numel() * (tokenizer.num_tokens - 1).bit_length()
        floats = tokenizer.config.latent_channels * indices[0].numel()
        return {"floats": floats, "bits": bits, "codes_used": used, "perplexity": float(entropy.exp())}
    posteriors = [tokenizer.encode(batch).latent_dist for batch in batches]
    nats = torch.cat([posterior.kl() for posterior in posteriors])
    return {"floats": posteriors[0].mean[0].numel(), "bits": float(nats.mean() / torch.tensor(2.0).log())}


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

    emoji, extractor = read_emoji(folder), FeatureExtractor(FEATURES)
    with FileLock(folder / "real.lock"):
        file = folder / "real.pt"
        if not file.exists():
            torch.save(statistics_of(Images(emoji.images), extractor), file)
    real = torch.load(file, weights_only=False)
    pipeline = DiffusionPipeline.from_pretrained(output / "final")
    options = {"top_p": config.sampling.top_p, "temperature": config.sampling.temperature}
    if experiment.tokens == "latents":
        options = {"num_head_steps": config.sampling.num_inference_steps}

    def drawn(kind: str, asked: list[int], scale: float) -> SampleFolder:
        where = output / f"samples-{kind}-{scale}"
        prompts = [emoji.names[i][0] for i in asked]
        sample_to_folder(pipeline, where, IMAGES, prompts=prompts, seed=seed, guidance_scale=scale, **options)
        return SampleFolder(where)

    heldout = [emoji.heldout[i % len(emoji.heldout)] for i in range(IMAGES)]
    sweep = [
        {"guidance_scale": scale, **measures(drawn("heldout", heldout, scale), heldout, emoji, real, extractor)}
        for scale in GUIDANCE
    ]
    some = emoji.some_of_training
    tokenizer = TOKENIZERS[type(pipeline.vae).__name__].from_pretrained(path).eval()
    with torch.no_grad():
        decoded = torch.cat([to_uint8(reconstruct(tokenizer, batch / 127.5 - 1)) for batch in emoji.images.split(64)])
    kept = statistics_of(Images(decoded[emoji.heldout]), extractor).kept
    if pictures is not None and seed == 0:
        save_pictures(name, experiment.tokens, drawn("heldout", heldout, SHOWN), emoji, decoded, pictures)
    return {
        "model": name,
        "seed": seed,
        "steps": steps,
        "params": sum(p.numel() for p in pipeline.transformer.parameters()),
        "loss": last.get("cross_entropy", last.get("velocity")),
        "seconds": last["seconds"],
        "sweep": sweep,
        "training": measures(drawn("training", some, SHOWN), some, emoji, real, extractor),
        "reconstructions": {
            "tokens": experiment.tokens,
            "errors": errors(emoji.images[some], decoded[some]),
            "errors_heldout": errors(emoji.images[emoji.heldout], decoded[emoji.heldout]),
            "heldout": retrieved(kept, emoji.heldout, emoji, real),
            "training": measures(Images(decoded[some]), some, emoji, real, extractor),
        },
        "real": measures(Images(emoji.images[some]), some, emoji, real, extractor),
        "tokens": about_tokens(tokenizer, emoji.images[: emoji.training]),
        "features": extractor.name,
        **environment(),
    }


def save_pictures(name: str, tokens: str, samples: SampleFolder, emoji: Emoji, decoded: Tensor, folder: Path) -> None:
    """One column for each held-out name: two samples of it; and the real images and their reconstructions."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = len(emoji.heldout)
    pictures = {
        name: torch.stack([samples[i]["image"] for i in range(2 * columns)]),
        "real": emoji.images[emoji.heldout],
        f"{tokens}-reconstructions": decoded[emoji.heldout],
    }
    for label, images in pictures.items():
        save_image(images / 255, folder / f"{label}.png", nrow=columns, padding=1)
    (folder / "names.json").write_text(json.dumps([emoji.names[i][0] for i in emoji.heldout]))


# ----------------------------------------------------------------------------------------------------------------------
# The report


def finish(report: dict, output: Path) -> None:
    text = tables(report)
    print(text)
    save_sweep(report, output.with_name(f"{output.stem}_guidance.png"))
    save_grid(report, output)
    if output == OUTPUT:
        notes = "\n".join(f"- `{name}`: {experiment.note}" for name, experiment in EXPERIMENTS.items())
        write_section("text_to_image", f"{text}\n\n{notes}")


def at_scale(row: dict, scale: float = SHOWN) -> dict:
    (found,) = (point for point in row["sweep"] if point["guidance_scale"] == scale)
    return found


def rate(points: list[dict], gallery: str) -> str:
    """The rates of the first and the first five, in percent, mean and spread over seeds."""
    return ", ".join(with_spread([100 * point[gallery][f"top{k}"] for point in points], 0) for k in TOP)


def tables(report: dict) -> str:
    """Markdown: the tokens, held-out names, names of training."""
    rows = by_model(report)
    rows = {name: rows[name] for name in EXPERIMENTS if name in rows}
    kinds = {own[0]["reconstructions"]["tokens"]: own[0] for own in rows.values()}
    first = next(iter(rows.values()))[0]
    chance = {"heldout": at_scale(first)["chance"], "training": first["training"]["chance"]}

    tokens = [_line("tokens", "floats", "bits", "codes used, perplexity", "Recon, training", "Recon, held out", "PSNR")]
    for kind, row in kinds.items():
        about, made = row["tokens"], row["reconstructions"]
        used = f"{about['codes_used']}, {about['perplexity']:.0f}" if "perplexity" in about else ""
        values = [f"{made[key]['recon']:.4f}" for key in ("errors", "errors_heldout")]
        cells = (about["floats"], f"{about['bits']:,.0f}", used, *values, f"{made['errors_heldout']['psnr']:.1f}")
        tokens.append(_line(f"`{kind}`", *cells))

    galleries = ["among_heldout", "name", "category"]
    columns = ["held-out names", "seeds", "parameters", "loss", "FD", "IS", "precision, recall"]
    heldout = [_line(*columns, "among the 20", "name among all", "category among all")]
    training = [_line("names of training", "FD", "IS", "precision, recall", "name among all", "category among all")]
    for name, own in rows.items():
        points, there = [at_scale(row) for row in own], [row["training"] for row in own]
        about = [str(len(own)), f"{own[0]['params'] / 1e6:.1f} M", with_spread([row["loss"] for row in own], 2)]
        found = [rate(points, gallery) for gallery in galleries]
        heldout.append(_line(f"`{name}`", *about, *_quality(points), *found))
        training.append(_line(f"`{name}`", *_quality(there), *(rate(there, gallery) for gallery in galleries[1:])))
    for kind, row in kinds.items():
        made = row["reconstructions"]
        found = [rate([made["heldout"]], gallery) for gallery in galleries]
        heldout.append(_line(f"reconstructions by `{kind}`", *[""] * 6, *found))
        found = [rate([made["training"]], gallery) for gallery in galleries[1:]]
        training.append(_line(f"reconstructions by `{kind}`", *_quality([made["training"]]), *found))
    training.append(_line("the real images", *_quality([first["real"]]), "", ""))
    heldout.append(_line("chance", *[""] * 6, *(rate([chance["heldout"]], gallery) for gallery in galleries)))
    training.append(_line("chance", *[""] * 3, *(rate([chance["training"]], gallery) for gallery in galleries[1:])))
    return "\n\n".join(
        "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])
        for lines in (tokens, heldout, training)
    )


def _line(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _quality(points: list[dict]) -> list[str]:
    values = {key: [point[key] for point in points] for key in ("fid", "is", "precision", "recall")}
    shares = ", ".join(with_spread(values[key], 2) for key in ("precision", "recall"))
    return [with_spread(values["fid"], 0), with_spread(values["is"], 2), shares]


def save_sweep(report: dict, file: Path) -> None:
    """FD and retrieval over the scale of guidance, a line for each seed."""
    kinds = {
        f"FD({FEATURES}), held-out names": lambda point: point["fid"],
        "nearest of the 20 is the one asked for": lambda point: point["among_heldout"]["top1"],
        "nearest of all is of its category": lambda point: point["category"]["top1"],
    }
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 4), constrained_layout=True)
    for axis, (title, value) in zip(axes, kinds.items()):
        for number, (name, rows) in enumerate(by_model(report).items()):
            for i, row in enumerate(rows):
                points = [(point["guidance_scale"], value(point)) for point in row["sweep"]]
                axis.plot(*zip(*points), color=f"C{number}", marker=".", label=None if i else name, alpha=0.8)
        axis.set(title=title, xlabel="guidance scale")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_grid(report: dict, output: Path) -> None:
    """Real images, reconstructions and samples of every model, one held-out name per column."""
    folder = output.with_suffix("")
    labels = ["real", *(f"{kind}-reconstructions" for kind in KINDS), *EXPERIMENTS]
    files = {label: folder / f"{label}.png" for label in labels}
    pictures = {label: plt.imread(file) for label, file in files.items() if file.exists()}
    names = json.loads((folder / "names.json").read_text())
    heights = [picture.shape[0] for picture in pictures.values()]
    size = {"figsize": (17, 1.5 + 0.013 * sum(heights)), "constrained_layout": True, "squeeze": False}
    figure, axes = plt.subplots(len(pictures), 1, height_ratios=heights, **size)
    for axis, (label, picture) in zip(axes[:, 0], pictures.items()):
        axis.imshow(picture, interpolation="nearest")
        axis.set(yticks=[], xticks=[])
        axis.set_ylabel(label.replace("-", "\n").replace("_", "\n"), rotation=0, ha="right", va="center")
    step = picture.shape[1] / len(names)
    top = axes[0, 0]
    top.set_xticks([step * (k + 0.5) for k in range(len(names))], names, rotation=35, ha="left", fontsize=8)
    top.xaxis.tick_top()
    figure.savefig(output.with_name(f"{output.stem}_samples.png"), dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main(__doc__, EXPERIMENTS, OUTPUT, finish, steps=2_000, seeds=2, run=run_row)
