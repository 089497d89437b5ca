"""Rows without any training, made quickly in a process of their own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guess:
    note: str
    value: float
    length: float = 1.0


def guess(task):
    with (task.runs / "made.txt").open("a") as file:
        file.write(f"{task.name}-{task.seed} ")
    return {"model": task.name, "seed": task.seed, "steps": task.steps, "value": task.variant.value + task.seed}


def tables(report):
    return "\n".join(f"{row['model']} {row['value']}" for row in report["rows"])
