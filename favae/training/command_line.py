"""The command line that both training scripts share."""

import argparse
import io
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr

from favae.errors import FavaeError, exit_on_error
from favae.files import check_output
from favae.ranges import Count, in_range
from favae.training.config import Config, load_config

logger = logging.getLogger(__name__)


def run_script(
    schema: type[Config],
    description: str,
    train: Callable[[Config], None],
    dry_run: Callable[[Config, int], None],
    argv: list[str] | None = None,
) -> None:
    """CONFIG.yaml [key=value ...] [--dry-run [--processes N]]; what the user can fix is one line and exit code 1."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a recipe, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, and exit")
    parser.add_argument(
        "--processes",
        type=in_range(Count),
        default=int(os.environ.get("WORLD_SIZE", 1)),
        help="the number of processes that a dry run counts with (default: those that it is started with)",
    )
    is_first = int(os.environ.get("RANK", 0)) == 0
    with nullcontext() if is_first else redirect_stderr(io.StringIO()):  # all processes have the same words
        arguments = parser.parse_intermixed_args(argv)
    level = logging.WARNING if is_first else logging.ERROR  # once per machine is enough
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    # A bug in the middle of a long training must not lose its traceback.
    with exit_on_error("the same command continues from the last checkpoint", (FavaeError,)):
        config = load_config(schema, arguments.config, arguments.overrides)
        check_output(str(config.output), "folder", "output")
        for key, step in config.milestones_not_reached.items():
            logger.warning("%s=%d is not reached: train.steps=%d", key, step, config.train.steps)
        if not arguments.dry_run:
            train(config)
        elif is_first:
            dry_run(config, arguments.processes)
