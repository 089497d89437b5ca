"""Which of two results of `favae evaluate` is better, if they can be compared."""

import json
import statistics
from pathlib import Path

from favae.errors import DataError
from favae.eval.results import (
    BEST_AT_ONE,
    WITHOUT_VERDICT,
    format_metric,
    format_table,
    higher_is_better,
    plain_name,
    read_results,
)

# Not compared: the hashes say whether what has another name is the same, and other autoencoders may have other patches.
FREE_IN_PROTOCOL = ("data_name", "reference_name", "patch_size")
GROUPED_BY = ("model", "guidance_scale")


def load_results(text: str) -> dict:
    """The task, the protocol and the rows of a results.json.

    Args:
        text: a file, or FILE:MODEL for the rows of one model.
    Raises:
        DataError: if there are none.
    """
    path, colon, model = text.rpartition(":")
    if not colon or Path(text).exists():
        path, model = text, None
    try:
        result = read_results(Path(path))
    except OSError as error:
        raise DataError(f"{text}: {error.strerror}; expected FILE or FILE:MODEL with a results.json") from error
    found = {key: result[key] for key in ("task", "protocol")}
    found["rows"] = [row for row in result["rows"] if model in (None, row["model"])]
    shapes = [row["latent_shape"] for row in found["rows"] if "latent_shape" in row]
    if shapes:  # of the chosen rows, which meters of latents depend on
        found["protocol"] = found["protocol"] | {"latent_shape": shapes[0]}
    if not found["rows"]:
        names = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
        raise DataError(f"{path} has no model '{model}', only {names or 'none'}")
    return found


def protocol_differences(first: dict, second: dict) -> list[str]:
    """How the tasks and the protocols of two results differ, one line for each key."""
    a, b = ({"task": result["task"], **result["protocol"]} for result in (first, second))
    keys = [key for key in dict.fromkeys([*a, *b]) if key not in FREE_IN_PROTOCOL and a.get(key) != b.get(key)]
    return [f"{key}: {_short(a.get(key))} and {_short(b.get(key))}" for key in keys]


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def compare_results(first: dict, second: dict) -> str:
    """Tables of two results side by side, one for each guidance scale, as text.

    Raises:
        DataError: if they are of different tasks, a side has several models, or nothing is common to both.
    """
    if first["task"] != second["task"]:
        raise DataError(f"a result of {first['task']} cannot be compared with one of {second['task']}")
    if first["task"] == "compression":
        raise DataError("rates differ; `favae evaluate compression` with both models gives the BD-rates of one table")
    groups, tables = (group(first["rows"]), group(second["rows"])), []
    for a, b in pair(*groups):
        sides = groups[0][a], groups[1][b]
        rows = []
        for name in (name for name in sides[0][0] if "_std" not in name):
            values = [[seed[name] for seed in side if seed.get(name) is not None] for side in sides]
            if all(values):
                cells = [_mean_and_spread(name, side) for side in values]
                rows.append({"": name, "A": cells[0], "B": cells[1], "better": verdict(name, *values)})
        if not rows:
            raise DataError("the two results have no metric in common")
        guidance = "" if a[1] is None else f", guidance {a[1]}"
        title = f"A: {a[0]} ({len(sides[0])} seeds), B: {b[0]} ({len(sides[1])} seeds){guidance}"
        tables.append(f"{title}\n{format_table(rows)}")
    return "\n\n".join(tables)


def group(rows: list[dict]) -> dict[tuple, list[dict[str, float | None]]]:
    """Metrics of each model and guidance scale, one entry per seed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in GROUPED_BY), []).append(row["metrics"])
    return groups


def pair(first: dict[tuple, list], second: dict[tuple, list]) -> list[tuple[tuple, tuple]]:
    """The groups to compare with each other: those of the same guidance scale, and of one model on each side.

    Raises:
        DataError: if a side has several models, or no guidance scale is common.
    """
    for side in (first, second):
        models = list(dict.fromkeys(key[0] for key in side))
        if len(models) > 1:
            raise DataError(f"several models ({', '.join(models)}); choose one with FILE:MODEL")
    pairs = [(a, b) for a in first for b in second if a[1] == b[1]]
    if not pairs and len(first) == len(second) == 1:  # images of another program have no guidance scale
        pairs = [(*first, *second)]
    if not pairs:
        scales = [", ".join(str(key[1]) for key in side) for side in (first, second)]
        raise DataError(f"no guidance scale in common: {scales[0]} and {scales[1]}")
    return pairs


def verdict(name: str, first: list[float], second: list[float]) -> str:
    """ "A" or "B", whichever is better, or why neither is: "equal", "within the spread"; "" for what is no quality.

    Beyond the spread is a difference of means larger than both standard deviations together. With one seed on a side
    there is no spread, and the verdict says so.

    Args:
        name: of the metric. first, second: its values, one per seed.
    """
    if plain_name(name) in WITHOUT_VERDICT:
        return ""
    if plain_name(name) in BEST_AT_ONE:
        first, second = ([abs(value - 1) for value in values] for values in (first, second))
    difference = statistics.mean(second) - statistics.mean(first)
    if difference == 0:
        return "equal"
    better = "B" if (difference > 0) == higher_is_better(name) else "A"
    if min(len(first), len(second)) < 2:
        return f"{better} (one seed)"
    spread = statistics.stdev(first) + statistics.stdev(second)
    return better if abs(difference) > spread else "within the spread"


def _mean_and_spread(name: str, values: list[float]) -> str:
    mean = format_metric(name, statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {format_metric(name, statistics.stdev(values))}"
