"""`favae cache-latents`, `embed-captions` and `verify`: what a generator is trained on, written once."""

import argparse
from pathlib import Path

from favae.cli_options import (
    add_data_options,
    add_loading_options,
    add_output_option,
    add_resolution_option,
    data_name,
    open_data,
)
from favae.commands import add_command
from favae.errors import hint
from favae.ranges import Count, Share, in_range


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "cache-latents",
        cache_latents,
        shares=True,
        help="write the latents of a set of images, for generators and for students of an autoencoder",
        description="Encode every image of a set and its mirror image, and write the latents to a folder.\n"
        "The images' captions, if they have any, are written beside them.",
        after_interrupt="the same command continues with the shards that are missing",
    )
    parser.add_argument("--tokenizer", required=True, help="a saved autoencoder: a folder or a hub name")
    add_resolution_option(parser)
    add_output_option(parser, "folder")
    parser.add_argument("--shard-size", type=in_range(Count), default=4096, help="images per file (default: 4096)")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    stored.add_argument("--compress", action="store_true", help="store latents in 6 bits, in a tenth of the space")
    parser.add_argument(
        "--low-pass",
        type=in_range(Share),
        metavar="RADIUS",
        help="encode images without frequencies above this share of the highest, for data.warmup_latents",
    )
    add_data_options(parser, "--data", split="train", captions=True)
    add_loading_options(parser)

    parser = add_command(
        commands,
        "embed-captions",
        embed_captions,
        shares=True,
        help="write the text embeddings of the captions of cached latents",
        description="Encode every caption of a cache of latents, and write the text embeddings to a folder.",
        after_interrupt="the same command continues with the shards that are missing",
    )
    parser.add_argument("--latents", type=Path, required=True, help="a finished cache of latents with captions")
    parser.add_argument("--encoder", required=True, help="minilm, or a folder or hub name that transformers opens")
    default = "a folder (default: text_embeddings in the folder of the latents)"
    add_output_option(parser, "folder", required=False, help=default)
    parser.add_argument(
        "--max-length", type=in_range(Count), help="tokens per caption (default: the most the encoder takes)"
    )
    parser.add_argument("--batch-size", type=in_range(Count), default=64)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")

    parser = add_command(
        commands,
        "verify",
        verify,
        help="tell whether a cache is as it was written",
        description="Compare all bytes of a cache of latents, its captions and its text embeddings with the checksums\n"
        "in their manifests, and with --data those of the images with what the latents were made of.",
    )
    parser.add_argument("folder", type=Path, help="a finished cache of latents, or of text embeddings")
    add_data_options(parser, "--data", split="train", required=False)


def cache_latents(arguments: argparse.Namespace) -> None:
    import torch

    from favae.autoencoders import load_autoencoder
    from favae.data.images import ImageDataset
    from favae.data.latent_writing import write_latent_cache
    from favae.distributed import process_state

    manifest = write_latent_cache(
        load_autoencoder(arguments.tokenizer),
        ImageDataset(open_data(arguments), arguments.resolution),
        arguments.output,
        data_name=data_name(arguments),
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        dtype=getattr(torch, arguments.dtype),
        compress=arguments.compress,
        low_pass=arguments.low_pass,
        num_workers=arguments.num_workers,
    )
    state = process_state()
    if state.is_main_process:
        captions = f" with {manifest['captions']['count']:,} captions" if manifest["captions"] else ""
        count, given = sum(manifest["counts"]), manifest["images"]
        skipped = f"; {given - count:,} of {given:,} cannot be read" if count < given else ""
        print(
            f"{count:,} images{captions} and their mirror images in {arguments.output}, "
            f"by {state.num_processes} process(es){skipped}"
        )


def embed_captions(arguments: argparse.Namespace) -> None:
    import torch

    from favae.data.text_embeddings import FOLDER, write_text_embeddings
    from favae.distributed import process_state
    from favae.text_encoder import TextEncoder

    with hint("--encoder FOLDER takes a local copy, --encoder minilm needs no network"):
        encoder = TextEncoder(arguments.encoder, arguments.max_length)
    manifest = write_text_embeddings(
        encoder,
        arguments.latents,
        arguments.output,
        batch_size=arguments.batch_size,
        dtype=getattr(torch, arguments.dtype),
    )
    state = process_state()
    if state.is_main_process:
        print(
            f"{manifest['count']:,} captions of {sum(manifest['counts']):,} images in "
            f"{arguments.output or arguments.latents / FOLDER}, {manifest['images_without']:,} images without, "
            f"by {state.num_processes} process(es)"
        )


def verify(arguments: argparse.Namespace) -> None:
    from favae.data.verification import verify_cache

    print(verify_cache(arguments.folder, open_data(arguments) if arguments.data is not None else None))
