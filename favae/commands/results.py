"""`favae compare` and `favae report`: commands that read results."""

import argparse
from pathlib import Path

from favae.commands import add_command
from favae.errors import DataError

COMPARE = """Say which of two results is better, if they can be compared.

    favae compare A/results.json B/results.json
    favae compare runs/reconstruction/results.json:ours runs/reconstruction/results.json:theirs

A and B are results.json of favae evaluate; :MODEL chooses one model of several. Rows of one model with several seeds
give a mean and a spread. Results of different protocols (other images, features, sampler ...) are refused."""


def add_commands(commands) -> None:
    parser = add_command(
        commands, "compare", compare, help="say which of two evaluation results is better", description=COMPARE
    )
    parser.add_argument("first", metavar="A.json[:MODEL]")
    parser.add_argument("second", metavar="B.json[:MODEL]")
    parser.add_argument("--force", action="store_true", help="compare in spite of different protocols")
    parser = add_command(commands, "report", report, help="write a page about the runs of make demo")
    parser.add_argument("folder", type=Path, help="the folder that holds the runs, such as runs/demo")


def compare(arguments: argparse.Namespace) -> None:
    from favae.eval.compare import compare_results, load_results, protocol_differences

    first, second = load_results(arguments.first), load_results(arguments.second)
    differences = protocol_differences(first, second)
    if differences:
        print("different protocols\n  " + "\n  ".join(differences) + "\n")
        if not arguments.force:
            raise DataError("results of different protocols are not compared; --force compares them all the same")
    print(compare_results(first, second))


def report(arguments: argparse.Namespace) -> None:
    from favae.eval.report import write_report

    print(f"report: {write_report(arguments.folder)}")
