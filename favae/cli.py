"""The command `favae`.

    favae COMMAND --help
    torchrun --nproc_per_node 8 -m favae cache-latents ...     (some commands share the work)

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import argparse
import io
import logging
import os
from contextlib import nullcontext, redirect_stderr

from favae.commands import caches, compression, conversion, evaluation, previews, reconstruction, results, training
from favae.errors import exit_on_error
from favae.files import check_output

DESCRIPTION = """Autoencoders for latent image generation: train them, measure them, train generators on their latents.

cache-latents, embed-captions, reference-statistics and evaluate reconstruction and generation share the work between
processes:
    torchrun --nproc_per_node 8 -m favae COMMAND ..."""


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand.

    An error the user can fix is one line and exit code 1, a wrong option exit code 2, Ctrl-C exit code 130.

    Args:
        argv: the words after `favae`; None takes those of the process.
    """
    parser = build_parser()
    first = int(os.environ.get("RANK", 0)) == 0
    with nullcontext() if first else redirect_stderr(io.StringIO()):  # all processes have the same words
        arguments, rest = parser.parse_known_args(argv)
        if rest and not arguments.passes_on:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not arguments.shares:
            parser.error("processes cannot share the work of this command; run it without torchrun")
    arguments.rest = rest

    level = logging.WARNING if first else logging.ERROR  # a warning of every process would be the same one
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    if arguments.passes_on:  # the training scripts end on their errors by themselves
        arguments.run(arguments)
        return
    with exit_on_error(arguments.after_interrupt):
        if getattr(arguments, "output", None) is not None:
            check_output(arguments.output, arguments.output_kind, "--output")
        arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="favae", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (training, caches, reconstruction, evaluation, previews, results, compression, conversion):
        module.add_commands(commands)
    return parser
