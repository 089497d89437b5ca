"""The subcommands of `favae`. Each module adds parsers and imports what a command needs when that command runs."""

import argparse
from collections.abc import Callable
from pathlib import Path

from favae.cli_options import path, text

__all__ = ["add_command"]


def add_command(
    commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    help: str,
    description: str | None = None,
    after_interrupt: str = "the same command starts again",
    shares: bool = False,
    **settings,
) -> argparse.ArgumentParser:
    """Adds a subcommand and returns its parser.

    Args:
        commands: what `add_subparsers` returned.
        run: is called with the parsed arguments.
        help: one line for the list of commands.
        description: what `--help` of the command says; without it, `help`.
        after_interrupt: what running the same command again does after Ctrl-C.
        shares: whether processes that torchrun starts share the work.
        settings: further arguments of `argparse.ArgumentParser`.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )
    parser.register("type", None, text)  # of options without a type: no text is empty
    parser.register("type", Path, path)
    parser.set_defaults(run=run, after_interrupt=after_interrupt, shares=shares, passes_on=False)
    return parser
