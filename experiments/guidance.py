#!/usr/bin/env python
"""Which guidance do samples need? Generators on the latents of several autoencoders at several scales, on glyphs.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.guidance

The generators are those of experiments/latents.py, which are trained if they are not in its run folder. Generators of
different latents are best at different scales, so that one scale for all is fair to none. The Fréchet distance is that
to the training set. Writes docs/results/guidance.json and .md.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from benchmarks.timing import device, environment
from experiments import latents
from experiments.report import format_table, means, rows_by_model
from experiments.rows import Comparison, Task, main
from experiments.training_sets import GLYPHS

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Variant:
    note: str
    length: float = 1.0


NAMES = ("stock", "split", "stock_aligned", "split_aligned")
VARIANTS = {name: Variant(latents.VARIANTS[name].note) for name in NAMES}


def make_row(task: Task) -> dict:
    """Samples one generator at each scale."""
    run = latents.trained_generator(task, task.name, task.seed)
    pipeline = DiffusionPipeline.from_pretrained(run / "final").to(device())
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "data": str(GLYPHS), "scales": []}
    for scale in SCALES:
        folder = task.run / f"samples-{scale}"
        options = {"guidance_scale": scale, "num_inference_steps": latents.NUM_INFERENCE_STEPS}
        _, metrics = GLYPHS.sample(pipeline, folder, task.seed, **options)
        row["scales"].append({"guidance_scale": scale, **metrics})
    return row | environment()


COLUMNS = {"fd": 1, "accuracy": 2, "is": 1, "precision": 2, "recall": 2}


def tables(report: dict) -> str:
    lines = []
    for name, rows in rows_by_model(report).items():
        for own in zip(*(row["scales"] for row in rows)):
            lines.append([f"`{name}`", len(own), own[0]["guidance_scale"], *means(own, COLUMNS)])
    return format_table(["latents of", "seeds", "scale", "FD", "accuracy", "IS", "precision", "recall"], lines)


COMPARISON = Comparison(
    name="guidance",
    variants=VARIANTS,
    prepare=lambda tasks: GLYPHS.file("train"),
    make_row=make_row,
    tables=tables,
    steps=latents.STEPS,
    seeds=1,
    resolution=GLYPHS.size,
    batch_size=GLYPHS.batch_sizes[0],
    pictures=False,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
