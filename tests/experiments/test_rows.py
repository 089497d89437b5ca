"""The rows of an experiment are made once, kept, and reported."""

import json
import pickle
import threading
import time

import pytest
from guesses import Guess, guess, tables

from experiments import (
    ablation,
    codebooks,
    compression,
    decoder_only,
    equal_budget,
    generator_quality,
    generators,
    glyph_texts,
    guidance,
    latents,
    rows,
    samplers,
    stft,
    text_to_image,
)
from experiments.rows import RESULTS, Comparison, main

EXPERIMENTS = (
    ablation,
    codebooks,
    compression,
    decoder_only,
    equal_budget,
    generator_quality,
    generators,
    glyph_texts,
    guidance,
    latents,
    samplers,
    stft,
    text_to_image,
)


def test_rows_that_are_missing_are_made_and_the_others_kept(tmp_path):
    variants = {"b": Guess("first", 1.0), "a": Guess("second", 2.0, length=3)}
    comparison = Comparison("guesses", variants, guess, tables, steps=10, seeds=1, other_sizes=True)
    output = tmp_path / "guesses.json"
    options = ["--output", str(output), "--runs", str(tmp_path / "runs"), "--jobs", "0"]

    main(comparison, "Guesses.", ["--models", "b", *options])
    main(comparison, "Guesses.", ["--steps", "20", "--models", "b", *options])
    main(comparison, "Guesses.", options)
    assert (tmp_path / "runs/made.txt").read_text() == "b-0 b-0 a-0 "
    report = json.loads(output.read_text())
    assert [(row["model"], row["steps"]) for row in report["rows"]] == [("a", 30), ("b", 10), ("b", 20)]
    assert {"command", "commit", "hardware", "versions"} <= set(report)
    with pytest.raises(SystemExit, match="resolution=64, not 128: name another --output"):
        main(comparison, "Guesses.", ["--resolution", "128", *options])

    # The table has the rows of 10 steps, in the order of the variants.
    markdown = output.with_suffix(".md").read_text()
    assert "b 1.0\na 2.0\n" in markdown and "- `b`: first\n- `a`: second" in markdown


def test_rows_have_processes_of_their_own(tmp_path):
    """One that fails is named with its log, and the others are kept; also names with a dot are different."""
    variants = {"good.1": Guess("works", 1.0), "good.2": Guess("works", 2.0), "bad": Guess("fails", None)}
    comparison = Comparison("guesses", variants, guess, tables, steps=10, seeds=1)
    options = ["--output", str(tmp_path / "guesses.json"), "--runs", str(tmp_path), "--jobs", "2"]
    with pytest.raises(RuntimeError, match="bad-0-10.log"):
        main(comparison, "", options)
    assert "TypeError" in (tmp_path / "bad-0-10.log").read_text()
    rows = json.loads((tmp_path / "guesses.json").read_text())["rows"]
    assert [(row["model"], row["value"]) for row in rows] == [("good.1", 1.0), ("good.2", 2.0)]
    assert (tmp_path / "good.1-0-10.log").exists() and (tmp_path / "good.2-0-10.log").exists()


def test_a_row_in_this_process_gets_signals(tmp_path):
    """Those that a training ends by with a checkpoint; only the main thread does."""
    threads = []

    def make_row(task):
        threads.append(threading.current_thread())
        return guess(task)

    comparison = Comparison("guesses", {"a": Guess("", 1.0)}, make_row, tables, steps=10, seeds=1)
    options = ["--output", str(tmp_path / "guesses.json"), "--runs", str(tmp_path / "runs"), "--jobs", "0"]
    main(comparison, "", options)
    assert threads == [threading.main_thread()]


def test_after_ctrl_c_no_row_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "make_in_process", rows.make_here)
    begun = []

    def make_row(task):
        begun.append(task.name)
        if task.name == "a":
            raise KeyboardInterrupt
        time.sleep(0.5)  # while the others are called off
        return guess(task)

    comparison = Comparison("guesses", {name: Guess("", 1.0) for name in "abc"}, make_row, tables, steps=10, seeds=1)
    options = ["--output", str(tmp_path / "guesses.json"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    with pytest.raises(KeyboardInterrupt):
        main(comparison, "", options)
    assert "c" not in begun


def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAVAE_GLYPHS", str(tmp_path))
    for experiment in (latents, codebooks, generators, stft):
        name = next(iter(experiment.VARIANTS))
        with pytest.raises(SystemExit, match=r"train.parquet: no such file; scripts/glyphs.py writes it"):
            main(experiment.COMPARISON, "", ["--models", name, "--output", str(tmp_path / "new.json")])
    with pytest.raises(SystemExit):
        main(latents.COMPARISON, "", ["--steps", "10"])
    assert "is of 6000 steps: name another --output" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_variant_can_be_sent_to_a_process(experiment):
    variants = experiment.COMPARISON.variants
    assert pickle.loads(pickle.dumps(variants)).keys() == variants.keys()


def test_published_tables_are_those_of_the_published_rows():
    """docs/results/NAME.md is what NAME.json says, and the pages of results quote lines of these files only."""
    written = set()
    for experiment in EXPERIMENTS:
        comparison = experiment.COMPARISON
        report = json.loads((RESULTS / f"{comparison.name}.json").read_text())
        assert {row["model"] for row in report["rows"]} <= set(comparison.variants)
        order = list(comparison.variants)
        report["rows"].sort(key=lambda row: order.index(row["model"]))
        markdown = comparison.markdown(report)
        assert (RESULTS / f"{comparison.name}.md").read_text() == markdown
        written |= set(markdown.splitlines())
    document = "".join((RESULTS.parent / f"{page}.md").read_text() for page in ("results", "results_short_trainings"))
    names = {name for experiment in EXPERIMENTS for name in experiment.VARIANTS}
    rows = [line for line in document.splitlines() if line.startswith("| `") and line.split("`")[1] in names]
    assert len(rows) > 25 and set(rows) <= written
