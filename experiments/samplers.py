#!/usr/bin/env python
"""How many evaluations of a generator do samples need? Euler, Heun, DPM-Solver++ and the SDE, on glyphs.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.samplers

The generator is that of `stock` of experiments/latents.py, which is trained if it is not in the run folder. The samples
of all rows begin with the same noise, without guidance; the Fréchet distance is that to the training set. Writes
docs/results/samplers.json and .md.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from benchmarks.timing import device, environment
from experiments import latents
from experiments.report import format_table, rows_by_model, with_std
from experiments.rows import Comparison, Task, main
from experiments.training_sets import GLYPHS
from favae.pipelines.solvers import Solver, flow_scheduler

EVALUATIONS = (8, 16, 32, 64)  # of the transformer, for each sample


@dataclass(frozen=True)
class Variant:
    note: str
    solver: Solver
    length: float = 1.0


VARIANTS = {
    "euler": Variant("Euler", "euler"),
    "heun": Variant("Heun: two evaluations in each step but the last", "heun"),
    "dpm": Variant("DPM-Solver++ of second order", "dpm++"),
    "sde": Variant("Euler-Maruyama on the reverse SDE", "sde"),
}


def make_row(task: Task) -> dict:
    """Samples with one solver, with several numbers of evaluations."""
    pipeline = DiffusionPipeline.from_pretrained(latents.trained_generator(task, "stock", 0) / "final").to(device())
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "data": str(GLYPHS), "curve": []}
    for evaluations in EVALUATIONS:
        pipeline.scheduler = flow_scheduler(task.variant.solver)
        steps = evaluations // 2 if task.variant.solver == "heun" else evaluations
        folder = task.run / f"samples-{evaluations}"
        options = {"guidance_scale": 1.0, "num_inference_steps": steps}
        _, metrics = GLYPHS.sample(pipeline, folder, task.seed, **options)
        row["curve"].append({"evaluations": evaluations, **metrics})
    return row | environment()


def tables(report: dict) -> str:
    lines = []
    for name, rows in rows_by_model(report).items():
        points = zip(*(row["curve"] for row in rows))
        lines.append([f"`{name}`", len(rows), *(with_std([point["fd"] for point in own], 1) for own in points)])
    return format_table(["solver", "seeds", *(f"FD, {count} evaluations" for count in EVALUATIONS)], lines)


COMPARISON = Comparison(
    name="samplers",
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
