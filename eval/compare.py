"""Which of two results is better, if they may be compared at all.

    python -m favae.eval.compare A.json B.json
    python -m favae.eval.compare runs/reconstruction/results.json:ours runs/reconstruction/results.json:theirs

A and B are results.json of the evaluators; :MODEL chooses one model of several. Rows of one model with several seeds
give a mean and a spread. Results of different protocols (other images, features, sampler ...) are refused.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from favae.errors import DataError
from favae.eval.results import format_metric, format_table, higher_is_better

FREE = ("data_name", "reference_name")  # the hashes say whether they are the same
GROUPED_BY = ("model", "guidance_scale")


def load_results(text: str) -> dict:
    """A results.json; of FILE:MODEL only that model's rows.

    Raises:
        DataError: if there are none.
    """
    path, colon, model = text.rpartition(":")
    if not colon or Path(text).exists():
        path, model = text, None
    try:
        result = json.loads(Path(path).read_text())
        rows = [row for row in result["rows"] if model in (None, row["model"])]
        kind, protocol = result["kind"], result["protocol"]
    except OSError as error:
        raise DataError(f"{text}: {error.strerror}; expected a results.json of an evaluator, or FILE:MODEL") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no results.json of an evaluator ({error!r})") from error
    if not rows:
        names = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
        raise DataError(f"{path} has no model '{model}', there are {names or 'none'}")
    return {"kind": kind, "protocol": protocol, "rows": rows}


def differences(first: dict, second: dict) -> list[str]:
    """What of two protocols differs, a line each."""
    if first["kind"] != second["kind"]:
        return [f"kind: {first['kind']} and {second['kind']}"]
    a, b = first["protocol"], second["protocol"]
    keys = [key for key in dict.fromkeys([*a, *b]) if key not in FREE and a.get(key) != b.get(key)]
    return [f"{key}: {_short(a.get(key))} and {_short(b.get(key))}" for key in keys]


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def group(rows: list[dict]) -> dict[tuple, list[dict[str, float | None]]]:
    """Metrics of each model and guidance scale, one entry per seed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in GROUPED_BY), []).append(row["metrics"])
    return groups


def pair(first: dict[tuple, list], second: dict[tuple, list]) -> list[tuple[tuple, tuple]]:
    """Which groups stand against each other: the same guidance, and one model of each side.

    Raises:
        DataError: if a side has several models, or no guidance scale is common.
    """
    for side in (first, second):
        models = list(dict.fromkeys(key[0] for key in side))
        if len(models) > 1:
            raise DataError(f"several models ({', '.join(models)}); choose one with FILE:MODEL")
    pairs = [(a, b) for a in first for b in second if a[1] == b[1]]
    if not pairs and len(first) == len(second) == 1:  # images of unknown origin against a pipeline's
        pairs = [(*first, *second)]
    if not pairs:
        scales = [", ".join(str(key[1]) for key in side) for side in (first, second)]
        raise DataError(f"no common guidance scale: {scales[0]} and {scales[1]}")
    return pairs


def judge(name: str, first: list[float], second: list[float]) -> str:
    """ "A", "B", or why neither: "within the spread", "one seed".

    Beyond the spread is a difference of means larger than the two standard deviations together.
    """
    difference = statistics.mean(second) - statistics.mean(first)
    if difference == 0:
        return "equal"
    better = "B" if (difference > 0) == higher_is_better(name) else "A"
    if min(len(first), len(second)) < 2:
        return f"{better} (one seed)"
    spread = statistics.stdev(first) + statistics.stdev(second)
    return better if abs(difference) > spread else "within the spread"


def compare(first: dict, second: dict) -> str:
    """The tables, as text.

    Raises:
        DataError: see `pair`.
    """
    groups, parts = (group(first["rows"]), group(second["rows"])), []
    for a, b in pair(*groups):
        sides = groups[0][a], groups[1][b]
        rows = []
        for name in (name for name in sides[0][0] if "_std" not in name):
            values = [[seed[name] for seed in side if seed.get(name) is not None] for side in sides]
            if not all(values):
                continue
            cells = [_with_spread(name, side) for side in values]
            rows.append({"": name, "A": cells[0], "B": cells[1], "better": judge(name, *values)})
        if not rows:
            raise DataError("the two have no measure in common")
        title = "" if a[1] is None else f", guidance {a[1]}"
        parts.append(
            f"A: {a[0]} ({len(sides[0])} seeds), B: {b[0]} ({len(sides[1])} seeds){title}\n{format_table(rows)}"
        )
    return "\n\n".join(parts)


def _with_spread(name: str, values: list[float]) -> str:
    mean = format_metric(name, statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {format_metric(name, statistics.stdev(values))}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="A.json[:MODEL]")
    parser.add_argument("second", metavar="B.json[:MODEL]")
    parser.add_argument("--force", action="store_true", help="compare in spite of different protocols")
    arguments = parser.parse_args(argv)
    try:
        first, second = load_results(arguments.first), load_results(arguments.second)
        differs = differences(first, second)
        if differs:
            if not arguments.force or first["kind"] != second["kind"]:
                hint = "" if first["kind"] != second["kind"] else " (--force compares all the same)"
                raise DataError(f"different protocols{hint}:\n  " + "\n  ".join(differs))
            print("WARNING: different protocols\n  " + "\n  ".join(differs) + "\n")
        print(compare(first, second))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
