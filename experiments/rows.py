"""The rows of a comparison: which are missing, each trained in a process of its own, all kept in one JSON file.

A row is one variant trained with one seed for one number of steps. Rows that the file has are not trained again, so an
interrupted experiment continues where it was. `main` is the command line of every experiment.
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
import yaml

from benchmarks.timing import RESULTS, ROOT, environment, make_parser
from favae.files import write_text
from favae.training.config import RunConfig, load_config

Settings = TypeVar("Settings", bound=RunConfig)


@dataclass(frozen=True)
class Task:
    """One row that is to be made.

    Attributes:
        name: of the variant.
        variant: what is trained, as the experiment describes it.
        seed: of weights and data.
        steps: how long it is trained.
        runs: the folder for the run folders.
        resolution, batch_size: of the training images.
        pictures: the folder for pictures; None if no pictures are wanted.
    """

    name: str
    variant: Any
    seed: int
    steps: int
    runs: Path
    resolution: int
    batch_size: int
    pictures: Path | None = None

    @property
    def run(self) -> Path:
        """The run folder of this row; one of another length has another."""
        return self.runs / f"{self.name}-{self.seed}-{self.steps}"

    def beside(self, suffix: str) -> Path:
        """A file next to the run folder."""
        return self.run.with_name(self.run.name + suffix)


def load_recipe(schema: type[Settings], task: Task, sections: dict, run: Path | None = None) -> Settings:
    """Settings of a training with a row's seed, from the sections of a recipe, which is left beside the run folder.

    Args:
        run: the folder of this training; None: the row's.
    """
    output = task.run if run is None else run
    recipe = output.with_name(f"{output.name}.yaml")
    recipe.write_text(yaml.safe_dump(sections, sort_keys=False))
    return load_config(schema, recipe, [f"output={output}", f"seed={task.seed}"])


@dataclass
class Comparison:
    """What one experiment consists of.

    Attributes:
        name: of its files in docs/results.
        variants: by the names of the rows. Each has `note`, a phrase for the list below the table, and `length`, its
            number of steps in multiples of the others'.
        prepare: makes what the rows need that are missing, or looks whether it is there; None for nothing.
        make_row: trains and measures one row; returns what the JSON file keeps of it.
        finish: adds to the report what is measured with all variants together, such as their speed; None for nothing.
        tables: the report as Markdown.
        figures: draws the report; the second argument is the path that the files' names begin with.
        steps, seeds: how many, unless the command says otherwise.
        resolution, batch_size: of the training images, likewise.
        other_sizes: whether these two are options of the command.
        pictures: whether rows leave pictures in docs/results/NAME/.
    """

    name: str
    variants: dict[str, Any]
    make_row: Callable[[Task], dict]
    tables: Callable[[dict], str]
    steps: int
    seeds: int
    prepare: Callable[[list[Task]], object] | None = None
    finish: Callable[[dict, Path], None] | None = None
    figures: Callable[[dict, Path], None] | None = None
    resolution: int = 64
    batch_size: int = 4
    other_sizes: bool = False
    pictures: bool = True

    def steps_of(self, name: str, steps: int) -> int:
        return round(steps * self.variants[name].length)

    def markdown(self, report: dict) -> str:
        """What docs/results/NAME.md holds: the tables, and a note on each variant."""
        shown = {row["model"] for row in report["rows"]}
        notes = [f"- `{name}`: {variant.note}" for name, variant in self.variants.items() if name in shown]
        head = f"# {self.name}\n\nOf {self.name}.json, which has the commands; see docs/results.md."
        return "\n".join([head, "", self.tables(report), "", *notes, ""])


def main(comparison: Comparison, description: str, argv: list[str] | None = None) -> None:
    """The command line of an experiment: trains the rows that are missing, then writes JSON, Markdown and figures."""
    arguments = parse_arguments(comparison, description, argv)
    output = arguments.output
    report = json.loads(output.read_text()) if output.exists() else {"rows": []}
    if not arguments.report:
        sizes = {"resolution": arguments.resolution, "batch_size": arguments.batch_size}
        for key in (key for key, value in sizes.items() if report.get(key, value) != value):
            raise SystemExit(f"error: {output} is of {key}={report[key]}, not {sizes[key]}: name another --output")
        report |= environment() | sizes
        make_missing_rows(comparison, arguments, report)

    # Only rows of this length are compared, in the order of the variants; others stay in the file.
    rows = report["rows"]
    wanted = [(name, comparison.steps_of(name, arguments.steps)) for name in comparison.variants]
    report["rows"] = [row for pair in wanted for row in rows if (row["model"], row["steps"]) == pair]
    if comparison.finish is not None and not arguments.report:
        comparison.finish(report, output.with_suffix(""))
    markdown = comparison.markdown(report)
    print(markdown)
    write_text(output.with_suffix(".md"), markdown)
    if comparison.figures is not None:
        comparison.figures(report, output.with_suffix(""))
    if not arguments.report:
        write_report(output, {**report, "rows": rows})


def parse_arguments(comparison: Comparison, description: str, argv: list[str] | None) -> argparse.Namespace:
    names = list(comparison.variants)
    parser = make_parser(description)
    parser.add_argument("--models", nargs="*", choices=names, default=names, metavar="MODEL", help="rows to train")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(comparison.seeds)))
    parser.add_argument("--steps", type=int, default=comparison.steps)
    parser.set_defaults(resolution=comparison.resolution, batch_size=comparison.batch_size)
    if comparison.other_sizes:
        parser.add_argument("--resolution", type=int, default=comparison.resolution)
        parser.add_argument("--batch-size", type=int, default=comparison.batch_size)
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="rows at a time, each in a process of its own, with one thread on a CPU; 0: one by one in this process",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{comparison.name}.json")
    parser.add_argument("--runs", type=Path, help="folder for the run folders (default: runs/NAME)")
    parser.add_argument("--report", action="store_true", help="train nothing: write table and figures again")
    arguments = parser.parse_args(argv)
    if arguments.steps != comparison.steps and arguments.output == parser.get_default("output"):
        parser.error(f"{arguments.output} is of {comparison.steps} steps: name another --output")
    return arguments


def make_missing_rows(comparison: Comparison, arguments: argparse.Namespace, report: dict) -> None:
    """Trains every row that was asked for and is not in the report; writes the report after each.

    Raises:
        RuntimeError: if the process of a row failed; the message names its log.
    """
    runs = (arguments.runs or ROOT / "runs" / arguments.output.stem).resolve()
    done = {(row["model"], row["seed"], row["steps"]) for row in report["rows"]}
    tasks = [
        Task(
            name=name,
            variant=comparison.variants[name],
            seed=seed,
            steps=comparison.steps_of(name, arguments.steps),
            runs=runs,
            resolution=arguments.resolution,
            batch_size=arguments.batch_size,
            pictures=arguments.output.resolve().with_suffix("") if comparison.pictures else None,
        )
        for seed in arguments.seeds
        for name in arguments.models
        if (name, seed, comparison.steps_of(name, arguments.steps)) not in done
    ]

    lock = Lock()

    def work(task: Task) -> None:
        make = make_in_process if arguments.jobs else make_here
        row = make(comparison.make_row, task)
        with lock:
            report["rows"].append(row)
            write_report(arguments.output, report)
        print(f"{task.name}, seed {task.seed}: done ({len(report['rows'])} rows)", flush=True)

    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started from here
    if tasks and comparison.prepare is not None:
        comparison.prepare(tasks)
    if not arguments.jobs:
        for task in tasks:  # in the main thread, which alone gets signals
            work(task)
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:  # the processes of rows get Ctrl-C as well
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_here(make_row: Callable[[Task], dict], task: Task) -> dict:
    task.runs.mkdir(parents=True, exist_ok=True)
    return make_row(task)


def make_in_process(make_row: Callable[[Task], dict], task: Task) -> dict:
    """The row, made by a new process whose output goes to a log beside the run folder."""
    task.runs.mkdir(parents=True, exist_ok=True)
    log, file = task.beside(".log"), task.beside(".json")
    process = get_context("spawn").Process(target=_write_row, args=(make_row, task, log, file))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{task.name}, seed {task.seed} failed; see {log}")
    return json.loads(file.read_text())


def _write_row(make_row: Callable[[Task], dict], task: Task, log: Path, file: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)  # also of the commands that the row starts
        os.dup2(stream.fileno(), 2)  # progress bars, warnings and the traceback of a failure
    write_text(file, json.dumps(make_row(task)))


def write_report(file: Path, report: dict) -> None:
    """Writes a report as JSON with one row per line, so that a difference between two versions can be read."""
    head = {key: value for key, value in report.items() if key != "rows"}
    rows = sorted(report["rows"], key=lambda row: (row["model"], row["seed"]))
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_text(file, json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ' + lines + "\n ]\n}\n")
