"""`favae evaluate reconstruction`, `latents`, `generation` and `compression`, and `favae reference-statistics`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from favae.cli_options import (
    AppendNamed,
    add_data_options,
    add_feature_options,
    add_loading_options,
    add_lpips_option,
    add_model_option,
    add_output_option,
    add_resolution_option,
    data_name,
    open_data,
    open_extractors,
    open_lpips,
    open_other_data,
)
from favae.commands import add_command, compression
from favae.errors import ConfigError, DataError, ModelError
from favae.ranges import Count, Halvings, Pixels, Probability, Seed, Share, Shift, Weight, in_range

RECONSTRUCTION = """Measure how well autoencoders reconstruct a set of images.

    favae evaluate reconstruction --model ours=runs/favae/final --model theirs=stabilityai/sd-vae-ft-mse \\
        --data IMAGES --resolution 256 --output runs/reconstruction

Any autoencoder of diffusers for images (gray, RGB or RGBA), and ours. A name given twice stands for two seeds of one
model. Prints a table; writes results.json, comparison.png (the worst images first), spectra.png and latents.png.

Recon, Low and High are mean squared errors in [-1, 1], unclamped, of the image, its Haar LL band, and the mean of LH,
HL and HH; the transform is orthonormal, so Recon = (Low + 3 High) / 4. PSNR, SSIM and MS-SSIM are means over images,
on 8 bits. Seams: how much pixels differ across the borders of what one latent stands for, relative to elsewhere and to
the images themselves; 1 is as in these. rFID compares with the same images unless --reference names statistics.
Images are center crops."""

GENERATION = """Measure how close generated images are to real ones.

    favae evaluate generation --pipeline runs/generator/final --reference imagenet/train --guidance-scale 1 1.5 \\
        --num-images 50000 --output runs/generation
    favae evaluate generation --samples FOLDER_OR_NPZ --reference VIRTUAL_imagenet256_labeled.npz --output runs/adm

A pipeline (class-conditional, text-to-image, or unconditional) is sampled into OUTPUT/samples/, once for each guidance
scale and seed, with classes or prompts in turn. Image i has its own seed: the number of processes changes nothing.
A folder or an .npz file of images is measured as it is. Prints a table; writes results.json and samples.png.

FID, sFID, precision and recall (k = 3, Inception's 2,048 features) follow ADM's evaluator, IS (10 splits) and KID
torch-fidelity. Metrics of other features have other names. Precision, recall and KID use at most 10,000 real images,
as ADM's evaluator does. MIND compares as many samples as half of these, and MIND_floor the halves; with several
--features, FDr^k is the mean of FDr over them; CMMD is computed with --features clip. Seams: how much pixels differ
across the borders of what one latent stands for, relative to elsewhere and to the real images; 1 is as in these."""


LATENTS = """Measure how hard latents will be for a generator, before one is trained.

    favae evaluate latents --latents ours=runs/latents --latents theirs=runs/other_latents --output runs/latent_metrics
    favae evaluate latents --model runs/favae/final --data photos --resolution 64 --output runs/latent_metrics

Of caches, and of models with images. Channels are standardized, as generators do. Lower is easier, but for LNC;
values can be compared between latents of one size, of models that reconstruct about equally well. Prints a table;
writes results.json and spectra.png.

VIV: what no flow model can explain of the velocity, with Gaussian classes; rho, the share of the variance within
classes; phi, VIV by what white noise of this variance has. LNC: how often the five nearest images by mean latent share
a class. SEC: the share of the energy above a quarter and a half of all frequencies, of which white noise has 0.84 to
0.87 and 0.44 to 0.48. iFID, with --model and --features: how far images are from what is decoded half the way between
their latents and neighbors."""

# Options of a pipeline, and what `sample_pipeline` calls them.
SAMPLING_OPTIONS = {
    **{name: name for name in ("num_images", "labels", "prompts", "guidance_interval", "guidance_channels", "shift")},
    **{name: name for name in ("solver", "num_inference_steps", "temperature", "top_k", "top_p", "dtype")},
    "trust_remote_code": "trust_remote_code",
    "guidance_scale": "guidance_scales",
    "seed": "seeds",
}


def add_commands(commands) -> None:
    evaluate = commands.add_parser("evaluate", help="measure autoencoders, latents, generators or compression")
    tasks = evaluate.add_subparsers(required=True, metavar="reconstruction | latents | generation | compression")
    _add_reconstruction(tasks)
    _add_latents(tasks)
    _add_generation(tasks)
    compression.add_evaluation(tasks)
    _add_reference_statistics(commands)


def _add_reconstruction(tasks) -> None:
    parser = add_command(
        tasks,
        "reconstruction",
        evaluate_reconstruction,
        shares=True,
        help="measure how well autoencoders reconstruct images",
        description=RECONSTRUCTION,
        after_interrupt="results.json holds the models that were finished; the same command measures all of them again",
    )
    add_model_option(parser)
    add_resolution_option(parser)
    add_output_option(parser, "folder")
    parser.add_argument("--reference", help="statistics for rFID (.safetensors or .npz) instead of the same images")
    add_lpips_option(parser)
    parser.add_argument("--posterior", choices=["mode", "sample"], default="mode")
    parser.add_argument(
        "--levels", type=in_range(Halvings), default=3, help="wavelet levels for the errors per band (default: 3)"
    )
    parser.add_argument("--examples", type=in_range(Count), default=8, help="images in comparison.png (default: 8)")
    add_data_options(parser, "--data", split="validation")
    add_feature_options(parser)
    add_loading_options(parser)


def _add_latents(tasks) -> None:
    parser = add_command(
        tasks,
        "latents",
        evaluate_latents,
        help="measure how hard latents will be for a generator",
        description=LATENTS,
    )
    cache = "a cache written by favae cache-latents; may be repeated"
    parser.add_argument("--latents", action=AppendNamed, default=[], metavar="[NAME=]CACHE", help=cache)
    add_model_option(parser, required=False)
    parser.add_argument("--resolution", type=in_range(Pixels), help="with --model: height and width of center crops")
    parser.add_argument(
        "--num-images", type=in_range(Count), default=50_000, help="at most, at even distances (default: 50,000)"
    )
    add_output_option(parser, "folder")
    add_data_options(parser, "--data", split="validation", required=False)
    add_feature_options(parser, [])
    add_loading_options(parser)


def _add_generation(tasks) -> None:
    parser = add_command(
        tasks,
        "generation",
        evaluate_generation,
        shares=True,
        help="measure how close generated images are to real ones",
        description=GENERATION,
        after_interrupt="the same command continues with the samples that are missing",
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--pipeline", help="a saved pipeline to sample: a folder or a hub name")
    images.add_argument("--samples", help="images that exist: a folder, or an .npz file (arr_0)")
    add_output_option(parser, "folder")
    parser.add_argument(
        "--validation",
        metavar="IMAGES",
        help="as many other real images, or their statistics: adds FDr, the Fréchet distance by that of these images",
    )
    parser.add_argument(
        "--patch-size",
        type=in_range(Count),
        metavar="PIXELS",
        help="with --samples: pixels per latent, for seams (of a pipeline they are known)",
    )
    parser.add_argument("--write-npz", action="store_true", help="write the samples for ADM's evaluator too, shuffled")
    group = parser.add_argument_group("sampling, with --pipeline")
    add_option = functools.partial(group.add_argument, default=argparse.SUPPRESS)  # `sample_pipeline` has the defaults
    add_option("--num-images", type=in_range(Count), help="(default: 50,000)")
    add_option("--labels", choices=["balanced", "random"], help="classes in turn (the default), or at random")
    add_option("--prompts", type=Path, help="a text file with a prompt per line, for text-to-image pipelines")
    add_option("--guidance-scale", type=in_range(Weight), nargs="+", help="1, the default, is without guidance")
    add_option(
        "--guidance-interval",
        type=in_range(Probability),
        nargs=2,
        metavar=("FROM", "TO"),
        help="times with guidance; 1 is data",
    )
    add_option(
        "--guidance-channels",
        type=in_range(Count),
        metavar="N",
        help="guide the first N latent channels alone, published 3",
    )
    add_option("--shift", type=in_range(Shift), help="of the scheduler (default: the pipeline's)")
    add_option(
        "--solver",
        choices=["euler", "heun", "dpm++", "sde"],
        help="of a LightningDiTPipeline: Euler, Heun (two evaluations per step), DPM-Solver++, or an SDE",
    )
    add_option("--num-inference-steps", type=in_range(Count), help="(default: 50; 25 per token for CAT's flow head)")
    add_option("--seed", type=in_range(Seed), nargs="+", help="(default: 0)")
    add_option("--temperature", type=in_range(Weight), help="of autoregressive pipelines, as the next two")
    add_option("--top-k", type=in_range(Count))
    add_option("--top-p", type=in_range(Share))
    add_option("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: float32)")
    add_option("--trust-remote-code", action="store_true", help="run the code in the pipeline's hub repository")
    add_data_options(parser, "--reference", split="train", also="; or statistics (.safetensors, ADM's .npz)")
    add_feature_options(parser)
    add_loading_options(parser)


def _add_reference_statistics(commands) -> None:
    parser = add_command(
        commands,
        "reference-statistics",
        reference_statistics,
        shares=True,
        help="write the statistics of real images once, for evaluate generation --reference",
    )
    add_resolution_option(parser)
    add_output_option(parser, "file", help="a .safetensors file")
    add_data_options(parser, "--data", split="train")
    add_feature_options(parser)
    add_loading_options(parser)


def evaluate_reconstruction(arguments: argparse.Namespace) -> None:
    from favae.data.images import ImageDataset
    from favae.distributed import process_state
    from favae.eval.autoencoder_evaluation import evaluate_autoencoders, table_row
    from favae.eval.references import Reference
    from favae.eval.results import format_table

    images = ImageDataset(open_data(arguments), arguments.resolution)
    extractors = open_extractors(arguments)
    reference = arguments.reference
    lpips = open_lpips(arguments.lpips_weights)
    rows, failures = evaluate_autoencoders(
        arguments.model,
        images,
        extractors,
        arguments.output,
        data_name=data_name(arguments),
        reference=Reference(reference, extractors) if reference else None,
        lpips=lpips,
        posterior=arguments.posterior,
        levels=arguments.levels,
        num_examples=arguments.examples,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    if process_state().is_main_process and rows:
        print(
            f"{data_name(arguments)} at {arguments.resolution} px, center crop, posterior {arguments.posterior}, "
            f"{extractors[0].metric('rFID')} against {reference or 'the same images'}"
        )
        print(format_table([table_row(row) for row in rows]))
    if failures:
        raise ModelError("; ".join(failures))


def evaluate_latents(arguments: argparse.Namespace) -> None:
    from favae.autoencoders import image_channels, load_autoencoder
    from favae.data.image_record import ImageRecord
    from favae.data.images import ImageDataset
    from favae.data.sources import Selection
    from favae.distributed import process_state
    from favae.eval import latent_evaluation
    from favae.eval.results import format_table, shown_metrics

    if not (arguments.latents or arguments.model):
        raise ConfigError("name latents by --latents CACHE, or by --model with --data and --resolution")
    if arguments.model and not (arguments.data and arguments.resolution):
        raise ConfigError("--model needs images: --data and --resolution")
    for option in ("features", "data", "resolution"):
        if getattr(arguments, option) and not arguments.model:
            raise ConfigError(f"--{option} is for --model: a cache has no images")
    count = arguments.num_images
    extractors = open_extractors(arguments)
    sets = [(name, latent_evaluation.cached_latents(folder, count)) for name, folder in arguments.latents]
    if arguments.model:
        source = open_data(arguments)
        digest = ImageRecord.of(source).digest()
        for name, found in sets:  # before hours are spent on the models
            if found.images not in (None, digest):
                raise DataError(f"{name} is of other images than --data {arguments.data}; its --split may be another")
        loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
        for name, path in arguments.model:
            vae = load_autoencoder(path).to(process_state().device)
            images = ImageDataset(Selection(source, count), arguments.resolution).with_channels(image_channels(vae))
            found = latent_evaluation.encoded_latents(vae, images, data_name(arguments), digest, **loading)
            if extractors:
                found.distances = latent_evaluation.interpolated_distances(
                    vae, found.latents, images, extractors, **loading
                )
            sets.append((name, found))
    features = {extractor.name: extractor.hash for extractor in extractors}
    rows = latent_evaluation.evaluate_latents(sets, arguments.output, features)
    print(
        f"{len(sets[0][1].latents):,} images of {sets[0][1].data} at {sets[0][1].resolution} px, standardized channels"
    )
    print(format_table([{"": row["model"], **shown_metrics(row)} for row in rows]))


def evaluate_generation(arguments: argparse.Namespace) -> None:
    from favae.distributed import process_state
    from favae.eval.generation import evaluate_samples, row_label
    from favae.eval.references import Reference
    from favae.eval.results import format_table, shown_metrics
    from favae.eval.sample_sets import given_samples, read_prompts, sample_pipeline

    sampling = {name: getattr(arguments, name) for name in SAMPLING_OPTIONS if name in arguments}
    interval = sampling.get("guidance_interval")
    if interval is not None and interval[0] > interval[1]:
        raise ConfigError(f"--guidance-interval must rise, got {' '.join(map(str, interval))}")
    extractors = open_extractors(arguments)
    reference = Reference(arguments.data, extractors, lambda: open_data(arguments))
    validation = None
    if arguments.validation:
        others = functools.partial(open_other_data, arguments, arguments.validation, "validation")
        validation = Reference(arguments.validation, extractors, others)
    if arguments.pipeline:
        if arguments.patch_size is not None:
            raise ConfigError("--patch-size is for --samples; that of a pipeline is known")
        if "prompts" in sampling:
            sampling["prompts"] = read_prompts(sampling["prompts"])
        settings = {SAMPLING_OPTIONS[name]: value for name, value in sampling.items()}
        samples = sample_pipeline(
            arguments.pipeline,
            arguments.output,
            **settings,
            batch_size=arguments.batch_size,
            check_size=lambda size: [known.check_size(size) for known in (reference, validation) if known],
        )
    else:
        for name in sampling:
            raise ConfigError(f"--{name.replace('_', '-')} is for --pipeline, not for images that exist")
        samples = given_samples(arguments.samples, arguments.patch_size)
    rows = evaluate_samples(
        samples,
        reference,
        extractors,
        arguments.output,
        reference_name=data_name(arguments),
        validation=validation,
        archives=arguments.write_npz,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    if process_state().is_main_process:
        print(f"{samples.name} against {data_name(arguments)}")
        print(format_table([{"": row_label(row), **shown_metrics(row)} for row in rows]))


def reference_statistics(arguments: argparse.Namespace) -> None:
    from favae.distributed import process_state
    from favae.eval.references import Reference, save_statistics

    if arguments.output.suffix != ".safetensors":
        raise ConfigError(f"--output must end in .safetensors, got {arguments.output}")
    if arguments.data.endswith((".safetensors", ".npz")):
        raise DataError(f"{arguments.data} holds statistics already, or images that are compared as they are")
    reference = Reference(arguments.data, open_extractors(arguments), lambda: open_data(arguments))
    size = (arguments.resolution, arguments.resolution)
    found = reference.statistics(size, batch_size=arguments.batch_size, num_workers=arguments.num_workers)
    if process_state().is_main_process:
        description = {"data": data_name(arguments), "resolution": arguments.resolution, "crop": "center"}
        save_statistics(arguments.output, found, description)
        for entry in found:
            print(f"{entry.extractor}: {entry.count:,} images, pixels {entry.hash[:12]}")
