"""`favae train-tokenizer` and `favae train-generator`: the two training scripts, with their own words passed on."""

import argparse

from favae.commands import add_command

DESCRIPTION = """{help}.

CONFIG.yaml is a recipe, such as those in configs/{folder}/. Settings that differ from it follow as section.key=value;
favae/training/{folder}_config.py has all of them with their defaults. The same command again continues from the newest
complete checkpoint in the run folder (output=FOLDER).

    --dry-run        print the settings and what would be trained, and exit
    --processes N    with --dry-run: count with N processes (default: those that it is started with)

On several GPUs: accelerate launch --num_processes 8 {script} CONFIG.yaml [key=value ...]"""


def add_commands(commands) -> None:
    for name, run, help, script in (
        ("train-tokenizer", train_tokenizer, "train an autoencoder", "train_tokenizer.py"),
        ("train-generator", train_generator, "train a generator on cached latents", "train_generator.py"),
    ):
        parser = add_command(
            commands,
            name,
            run,
            help=help,
            description=DESCRIPTION.format(help=help.capitalize(), folder=name.removeprefix("train-"), script=script),
            shares=True,
            usage=f"favae {name} CONFIG.yaml [key=value ...] [--dry-run [--processes N]]",
        )
        parser.set_defaults(passes_on=True)


def train_tokenizer(arguments: argparse.Namespace) -> None:
    import train_tokenizer as script

    script.main(arguments.rest)


def train_generator(arguments: argparse.Namespace) -> None:
    import train_generator as script

    script.main(arguments.rest)
