"""What the tokenizer benchmarks share: train each model with each seed, measure along the way, keep the rows as JSON.

Rows that the output file has are kept, so an interrupted benchmark goes on where it was. Every row is trained by
train_tokenizer.py's own `train`, in a process of its own, on averaged weights at a constant learning rate: each point
of a curve is what that many steps give.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from favae.autoencoders import measure_budget, reconstruct  # noqa: E402
from favae.data.images import ImageDataset, skip_missing  # noqa: E402
from favae.data.sources import open_source  # noqa: E402
from favae.eval.extraction import image_statistics  # noqa: E402
from favae.eval.features import FeatureExtractor  # noqa: E402
from favae.eval.image_sets import CroppedImages  # noqa: E402
from favae.eval.reconstruction import PER_IMAGE, evaluate_reconstruction, image_errors  # noqa: E402
from favae.training.checkpoints import find_checkpoints  # noqa: E402
from favae.training.config import TokenizerConfig, load_config  # noqa: E402
from favae.training.models import build_model, find_model_class  # noqa: E402
from train_tokenizer import train  # noqa: E402

POINTS = 4  # of a curve
OTHER_SPLITS = ("validation", "test")
EXAMPLES = 8  # held-out images in a strip
BASE = {
    "data": {"path": "photos"},
    "loss": {"reconstruction": "l2", "kl": 1e-6},
    "train": {
        "resolution": 64,
        "batch_size": 4,
        "learning_rate": 2.5e-4,  # the best of 2.5e-4, 5e-4 and 1e-3 for the plain model, one seed
        "betas": [0.9, 0.99],
        "lr_warmup_steps": 100,
        "max_grad_norm": 1.0,
        "ema_decay": 0.995,
        "mixed_precision": "bf16",
        "num_workers": 0,
        "sample_every": 0,
        "checkpoints_total_limit": None,
        "tracker": None,
    },
}


@dataclass
class Experiment:
    """A row of a table: a model, and what differs from `BASE` in its training."""

    model: dict
    note: str
    loss: dict = field(default_factory=dict)
    length: float = 1.0  # its steps, in multiples of the benchmark's

    def recipe(self, steps: int) -> dict:
        loss = {**BASE["loss"], **self.loss}
        train_settings = {**BASE["train"], "steps": steps, "log_every": steps // POINTS}
        train_settings["checkpoint_every"] = steps // POINTS
        return {"model": self.model, "data": BASE["data"], "loss": loss, "train": train_settings}


def photos(split: str) -> ImageDataset:
    return ImageDataset(open_source("photos", split), BASE["train"]["resolution"])


@torch.no_grad()
def errors(vae, split: str) -> dict[str, float]:
    dataset = photos(split)
    images = skip_missing([dataset[i] for i in range(len(dataset))])["image"]
    rows = torch.cat([image_errors(x, reconstruct(vae, x)) for x in images.split(32)])
    return named_means(rows)


def named_means(rows: Tensor) -> dict[str, float]:
    """Means of what `image_errors` gives, without those that are not measured."""
    means = zip(PER_IMAGE, rows.double().mean(dim=0).tolist())
    return {name.lower(): value for name, value in means if value == value}


@torch.no_grad()
def error_spectrum(vae) -> list[float]:
    """The error's share of the image's power per ring of frequencies, 0 to half a cycle per pixel, held-out images."""
    dataset = photos("heldout")
    images = skip_missing([dataset[i] for i in range(len(dataset))])["image"]
    difference = torch.cat([reconstruct(vae, x) - x for x in images.split(32)])
    size = images.shape[-1]
    frequency = torch.fft.fftfreq(size)
    ring = ((frequency[:, None] ** 2 + frequency[None] ** 2).sqrt() * size).round().long().flatten()

    def power(x: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1)).flatten()
        return torch.zeros(int(ring.max()) + 1).index_add_(0, ring, spectrum)[: size // 2 + 1]

    return [round(float(share), 5) for share in power(difference) / power(images)]


def run_row(name: str, experiment: Experiment, seed: int, steps: int, folder: Path, strips: Path | None) -> dict:
    """Trains one model with one seed; returns its row.

    Args:
        folder: for the run.
        strips: where the first seed's pictures go; None leaves out pictures, the error's spectrum and rFD.
    """
    output = folder / f"{name}-{seed}"
    recipe = folder / f"{name}-{seed}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(experiment.recipe(steps), sort_keys=False))
    config = load_config(TokenizerConfig, recipe, [f"output={output}", f"seed={seed}"])
    train(config)
    kind = find_model_class(config.model["name"])
    curve = []
    for step, path in find_checkpoints(output / "checkpoints"):
        vae = kind.from_pretrained(path / "ema").eval()
        curve.append({"steps": step, **errors(vae, "heldout"), **{name: errors(vae, name) for name in OTHER_SPLITS}})
    resolution = config.train.resolution
    size = {key: value for key, value in asdict(measure_budget(vae, resolution)).items() if value is not None}
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    row = {"model": name, "seed": seed, "steps": steps, **curve[-1], **size, "seconds": last["seconds"], "curve": curve}
    row["training"] = {key: value for key, value in last.items() if key not in ("step", "seconds")}
    if strips is not None:
        extractor = FeatureExtractor("efficientnet-lite0")
        images = photos("heldout")
        references = image_statistics(CroppedImages(images), [extractor])
        row["rfd"] = evaluate_reconstruction(vae, images, [extractor], references).metrics[extractor.metric("rFID")]
        row["rfd_features"] = extractor.name
        row["error_spectrum"] = error_spectrum(vae)
        if seed == 0:
            save_pictures(vae, name, strips)
    shutil.rmtree(output / "checkpoints")
    return row | environment()


def save_pictures(vae, name: str, folder: Path) -> None:
    """NAME.png and original.png: a few held-out images in a row."""
    dataset = photos("heldout")
    chosen = [i * len(dataset) // EXAMPLES + i % 2 for i in range(EXAMPLES)]  # of both photographs
    images = torch.stack([dataset[i]["image"] for i in chosen])
    with torch.no_grad():
        pictures = {name: reconstruct(vae, images), "original": images}
    folder.mkdir(parents=True, exist_ok=True)
    for label, picture in pictures.items():
        save_image(picture, folder / f"{label}.png", nrow=EXAMPLES, padding=0, normalize=True, value_range=(-1, 1))


def environment() -> dict:
    packages = ("torch", "diffusers", "accelerate", "favae")
    return {
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": _gpu()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor()


def throughput(experiments: dict[str, Experiment], reference: str, rounds: int = 15, batch_size: int = 16) -> dict:
    """Encode + decode speed relative to one model: every model in turn on the same batch, one thread.

    Returns:
        For each model the median of the ratios of the rounds, with the lowest and the highest.
    """
    torch.set_num_threads(1)
    size = BASE["train"]["resolution"]
    images = torch.rand(batch_size, 3, size, size) * 2 - 1
    models = {name: build_model(experiment.model).eval() for name, experiment in experiments.items()}
    times = {name: [] for name in models}
    with torch.no_grad():
        for i in range(rounds + 1):
            for name, vae in models.items():
                started = time.perf_counter()
                reconstruct(vae, images)
                if i:  # the first is a warm-up
                    times[name].append(time.perf_counter() - started)
    result = {}
    for name in models:
        ratios = [ours / own for ours, own in zip(times[reference], times[name])]
        result[name] = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    return result


def main(
    description: str,
    experiments: dict[str, Experiment],
    output: Path,
    finish,
    *,
    steps: int,
    seeds: int,
    pictures: bool = True,
    run=run_row,
    sizes: bool = True,
) -> None:
    """The command line: trains what is missing, then `finish` adds to the report and draws.

    Args:
        finish: called with a report of the rows of this number of steps and of the models there are, and the output
            file, when all rows are there.
        pictures: whether rows have pictures, the error's spectrum and rFD.
        run: trains and measures a row, as `run_row`.
        sizes: whether resolution and batch size are options.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(experiments), default=list(experiments), metavar="MODEL")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(seeds)))
    parser.add_argument("--steps", type=int, default=steps)
    if sizes:
        parser.add_argument("--resolution", type=int, default=BASE["train"]["resolution"])
        parser.add_argument("--batch-size", type=int, default=BASE["train"]["batch_size"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time, one thread each on a CPU")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--runs", type=Path, help="run folders; by default runs/<name of the output>")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    def steps_of(name: str) -> int:
        return round(arguments.steps * experiments[name].length)

    if sizes:
        BASE["train"] |= {"resolution": arguments.resolution, "batch_size": arguments.batch_size}
    runs = arguments.runs or ROOT / "runs" / arguments.output.stem
    strips = arguments.output.with_suffix("") if pictures else None
    if arguments.worker:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        name, seed = arguments.worker[0], int(arguments.worker[1])
        row = run(name, experiments[name], seed, steps_of(name), runs, strips)
        (runs / f"{name}-{seed}.json").write_text(json.dumps(row))
        return

    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    head = {"command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]), **environment()}
    done = {(row["model"], row["seed"], row["steps"]) for row in rows}
    wanted = [(name, seed) for seed in arguments.seeds for name in arguments.models]
    missing = [(name, seed) for name, seed in wanted if (name, seed, steps_of(name)) not in done]

    def work(pair: tuple[str, int]) -> None:
        name, seed = pair
        command = [sys.executable, *sys.argv, "--worker", name, str(seed)]
        log = runs / f"{name}-{seed}.log"
        runs.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads})
        if result.returncode:
            raise RuntimeError(f"{name}, seed {seed} failed; see {log}")
        rows.append(json.loads((runs / f"{name}-{seed}.json").read_text()))
        write(arguments.output, {**head, "rows": rows})
        print(f"{name}, seed {seed}: done ({len(rows)} rows)", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in [pool.submit(work, pair) for pair in missing]:
            future.result()
    shown = [row for row in rows if row["model"] in experiments and row["steps"] == steps_of(row["model"])]
    report = {**head, "rows": shown}
    finish(report, arguments.output)
    write(arguments.output, {**report, "rows": rows})


def write(file: Path, report: dict) -> None:
    """The report, one row per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in report.items() if key != "rows"}
    rows = ",\n  ".join(json.dumps(row) for row in sorted(report["rows"], key=lambda row: (row["model"], row["seed"])))
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + rows + "\n ]\n}\n")
    temporary.rename(file)


def spread(values: list[float], scale: float = 1.0) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [value * scale for value in values]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def flops(experiment: Experiment) -> int:
    with torch.device("meta"):
        return measure_budget(build_model(experiment.model), BASE["train"]["resolution"]).flops
