#!/usr/bin/env python
"""Trains a generator on a latent cache: LightningDiT, DiT or a UNet, by flow matching or (the latter two) diffusion;
CAT token by token or from coarse to fine. They are told classes or (LightningDiT, CAT) texts.

    tokenizer first   python train_tokenizer.py ...; favae cache-latents ...
    for texts         favae embed-captions --latents LATENTS --encoder minilm
    one process       python train_generator.py configs/generator/photos_lightningdit.yaml
    8 GPUs            accelerate launch --num_processes 8 train_generator.py CONFIG.yaml data.latents=LATENTS
    2 CPU processes   torchrun --nproc_per_node 2 train_generator.py CONFIG.yaml
    4 x 8 GPUs        torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                          train_generator.py CONFIG.yaml                      (on each of the four; HOST is one of them)
    with SLURM        srun --kill-on-bad-exit=1 --nodes 4 --ntasks-per-node 1 bash -c 'torchrun --nnodes 4 \\
                          --nproc_per_node 8 --rdzv_backend c10d --rdzv_id $SLURM_JOB_ID --rdzv_endpoint \\
                          $(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500 \\
                          train_generator.py CONFIG.yaml'
    what would run    python train_generator.py CONFIG.yaml --dry-run

Settings are `section.key=value`; the schema with its defaults is favae/training/generator_config.py. The same command
again continues from the newest complete checkpoint (resume=auto), bit for bit on a CPU. The run folder (output=..., by
default runs/<recipe>) holds config.yaml, metrics.jsonl, logs/ (TensorBoard), samples/ (guided, from the EMA weights),
checkpoints/step-N/ and, at the end, final/: a pipeline for `DiffusionPipeline.from_pretrained`, tokenizer included.
For what one GPU cannot hold: train.shard=true divides parameters, optimizer and EMA among the processes (FSDP), and
train.gradient_checkpointing=true computes activations twice. train.compile=true compiles each block.
With evaluation.every=K evaluation.reference=STATISTICS, FID and the other metrics of the EMA weights go to
evaluation.jsonl every K steps, with the epochs that FID <= k took (EP_FID@k).
"""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    UNet2DModel,
)
from torchvision.utils import save_image

from favae.adapters.pipelines import fold_latent_statistics
from favae.autoencoders import spatial_compression_ratio
from favae.data.captions import first_captions
from favae.data.images import ImageDataset
from favae.data.latents import MomentsDataset, TokenDataset, load_tokenizer, open_latents
from favae.data.latents_with_images import LatentsWithImages
from favae.data.sources import open_source
from favae.data.text_embeddings import FOLDER as TEXT_EMBEDDINGS_FOLDER
from favae.data.text_embeddings import TextEmbeddings
from favae.errors import ConfigError, NonFiniteError, hint
from favae.eval.online import GeneratorEvaluation
from favae.files import atomic_path
from favae.foundation import FoundationModel
from favae.models.class_conditional import num_classes
from favae.pipelines import CATPipeline, LightningDiTPipeline
from favae.pipelines.solvers import flow_scheduler
from favae.training.autoregression import AutoregressionModule, check_tokens, open_text_encoder
from favae.training.command_line import run_script
from favae.training.config import to_yaml
from favae.training.diffusion import DIFFUSION_SCHEDULE, DiffusionModule
from favae.training.dry_run import describe_run, without_memory
from favae.training.generator_config import GeneratorConfig
from favae.training.models import build_model, enable_gradient_checkpointing
from favae.training.optimization import (
    Ema,
    clip_gradients,
    create_optimizers,
    create_schedule,
    matrices_of,
    optimizer_step,
    weight_decay_groups,
)
from favae.training.run import Run, find_checkpoint_to_resume
from favae.training.sharding import blocks_of, compile_blocks, gather_full_model, shard


def train(config: GeneratorConfig) -> None:
    settings, alignment = config.train, config.loss.alignment
    run = Run(config)
    accelerator = run.accelerator

    # Tokenizer, latents, generator and pipeline. Whatever is missing is reported here, before anything is written.
    for key in ("latents", "tokenizer"):
        if getattr(config.data, key) is None:
            raise ConfigError(f"data.{key} is missing")
    tokenizer = load_tokenizer(config.data.tokenizer)
    dataset = open_cache(config, tokenizer)
    transformer = build_model(config.model)
    check_shapes(config, transformer, dataset)
    warmup = open_warmup(config, tokenizer, dataset)
    with_images = LatentsWithImages(dataset, open_images(config, dataset)) if alignment.weight else None
    pipeline = build_pipeline(config, transformer, tokenizer, dataset).to(run.device)
    with accelerator.main_process_first():  # one process downloads, the others find it
        module = build_training_module(config, transformer)
    blocks = blocks_of(transformer)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(transformer)
    if settings.compile:
        compile_blocks(blocks)
    if settings.shard:  # a DiT asks its first block for the embedding of the time once more at its end
        shard(module, blocks[1:] if config.builds(DiTTransformer2DModel) else blocks)

    # The optimizer: AdamW, and Muon for the matrices of the blocks if it is asked for.
    matrices = matrices_of(blocks) if settings.optimizer == "muon" else []
    groups = weight_decay_groups(module, [p for p in module.parameters() if p.requires_grad])
    optimizers = create_optimizers(groups, settings, settings.learning_rate, matrices)
    schedules = [create_schedule(optimizer, settings) for optimizer in optimizers]
    model, optimizers = run.prepare(module, optimizers)
    ema = Ema(transformer, settings.ema_decay, run.device, warmup=settings.ema_warmup)
    evaluate = None
    if config.evaluation.every:
        size = transformer.config.sample_size * spatial_compression_ratio(tokenizer)
        with hint(
            "evaluation.weights=FILE takes a local file, evaluation.features=efficientnet-lite0 needs no network"
        ):
            evaluate = GeneratorEvaluation(config.evaluation, run.folder, (size, size))
    about = dataset.about if warmup is None else {**dataset.about, "warmup": warmup.about}
    run.start(module.trained_parts(), ema, optimizers, schedules, about)

    # Images are read as long as hidden states are aligned with their features, and latents alone from then on.
    # Before that, latents of images without high frequencies, if there are any.
    batches = run.batches(dataset)
    if with_images is not None:
        batches = itertools.chain(run.batches(with_images, until=alignment.stop_step), batches)
    if warmup is not None:
        batches = itertools.chain(run.batches(warmup, until=config.data.warmup_steps), batches)

    for batch in batches:
        model.train()
        with accelerator.accumulate(model):
            # 1. Forward: latents from their posteriors, or tokens, and the losses on what the generator makes of them.
            loss, logs = model(dataset.sample(batch), batch)

            # 2. Backward.
            accelerator.backward(loss)

            if accelerator.sync_gradients:
                # 3. Clip the gradient. If it is not finite, the step is skipped by every process.
                finite = clip_gradients(accelerator, model, settings.max_grad_norm)

                # 4. Optimizer step.
                optimizer_step(accelerator, optimizers, schedules, finite)

                # 5. Moving average of the weights.
                if finite:
                    ema.step()

        run.collect(logs)
        if accelerator.sync_gradients:
            run.end_step(finite)
            if run.checkpoint_due():  # before what takes long
                run.save_checkpoint()
            if run.due(settings.sample_every):
                with ema_pipeline(run, pipeline, ema):
                    save_samples(run, pipeline, **sampling_options(config, dataset), **config.sampling.guidance)
            if evaluate is not None and run.due(config.evaluation.every):
                with ema_pipeline(run, pipeline, ema):
                    metrics = evaluate(pipeline, run.step, run.epoch(dataset))
                accelerator.log({k: v for k, v in metrics.items() if v is not None}, step=run.step)

    with ema_pipeline(run, pipeline, ema, to_be_saved=True):
        run.finish(pipeline.save_pretrained)


# Before the first step ------------------------------------------------------------------------------------------------


def open_cache(config: GeneratorConfig, tokenizer: ModelMixin | None = None) -> MomentsDataset | TokenDataset:
    """The latents, with the embeddings of their captions if the generator is conditioned on texts."""
    data, embeddings = config.data, None
    if config.takes_texts:
        with hint("`favae embed-captions` writes data.text_embeddings"):
            embeddings = TextEmbeddings(data.text_embeddings or Path(data.latents) / TEXT_EMBEDDINGS_FOLDER)
    with hint("`favae cache-latents` writes data.latents with data.tokenizer"):
        dataset = open_latents(data.latents, tokenizer, flip=data.flip, text_embeddings=embeddings)
    if data.normalization == "global":
        if isinstance(dataset, TokenDataset):
            raise ConfigError("data.normalization is for latents, not for tokens")
        dataset.share_std()
    return dataset


def open_warmup(
    config: GeneratorConfig, tokenizer: ModelMixin, dataset: MomentsDataset | TokenDataset
) -> MomentsDataset | TokenDataset | None:
    """The latents that are learned first, which are normalized as the others are. Source: arXiv 2511.22249."""
    if config.data.warmup_latents is None:
        return None
    with hint("`favae cache-latents --low-pass 0.2` writes data.warmup_latents with data.tokenizer"):
        warmup = open_latents(config.data.warmup_latents, tokenizer, flip=config.data.flip)
    for key in ("latent_shape", "classes"):
        if warmup.manifest[key] != dataset.manifest[key]:
            raise ConfigError(f"data.warmup_latents have another {key} than data.latents")
    return warmup


def open_images(config: GeneratorConfig, dataset: MomentsDataset | TokenDataset) -> ImageDataset:
    """The images behind the latents, at the cache's resolution."""
    data = config.data
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    source = open_source(data.images, data.split, min_size=data.min_size, **columns)
    return ImageDataset(source, dataset.manifest["resolution"])


def check_shapes(config: GeneratorConfig, transformer: ModelMixin, dataset: MomentsDataset | TokenDataset) -> None:
    """Raises ConfigError if the generator was built for other latents, classes or texts than the cache has."""
    built, folder = transformer.config, dataset.folder
    if config.is_autoregressive:
        check_tokens(transformer, dataset)
    elif not isinstance(dataset, MomentsDataset):
        raise ConfigError(f"{folder} holds tokens of a codebook, which are for a CATTransformerModel")
    elif dataset.latent_shape != (expected := (built.in_channels, built.sample_size, built.sample_size)):
        raise ConfigError(
            f"{folder} holds latents of shape {dataset.latent_shape}, "
            f"the generator is built for {expected} (model.in_channels, model.sample_size)"
        )
    if config.takes_texts and dataset.text_embeddings.dim != built.text_dim:
        raise ConfigError(
            f"{folder} has text embeddings of {dataset.text_embeddings.dim} numbers, the generator is built for "
            f"{built.text_dim} (model.text_dim)"
        )
    if num_classes(transformer) and len(dataset.classes) > num_classes(transformer):
        key = next(key for key in ("num_classes", "num_embeds_ada_norm", "num_class_embeds") if key in built)
        raise ConfigError(
            f"{folder} has {len(dataset.classes)} classes, the generator {num_classes(transformer)} (model.{key})"
        )


def build_training_module(config: GeneratorConfig, transformer: ModelMixin) -> DiffusionModule | AutoregressionModule:
    """Joins the generator with its losses and, for alignment, with the frozen network that it is aligned to."""
    if config.is_autoregressive:
        return AutoregressionModule(transformer)
    teacher, alignment = None, config.loss.alignment
    if alignment.weight:
        with hint(
            "loss.alignment.weights=FILE takes a local file, "
            "loss.alignment.backbone=efficientnet-lite0 needs no network"
        ):
            teacher = FoundationModel(alignment.backbone, alignment.weights)
    return DiffusionModule(transformer, config.loss, teacher)


def build_pipeline(
    config: GeneratorConfig, transformer: ModelMixin, tokenizer: ModelMixin, dataset: MomentsDataset | TokenDataset
) -> DiffusionPipeline:
    """What samples the generator. Its autoencoder carries the statistics that the latents were normalized with."""
    if isinstance(dataset, MomentsDataset):
        statistics = {"latents_mean": dataset.mean.flatten().tolist(), "latents_std": dataset.std.flatten().tolist()}
        tokenizer.register_to_config(**statistics, scaling_factor=1.0, shift_factor=0.0)
    names = dict(enumerate(dataset.classes)) if num_classes(transformer) else None
    options: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "id2label": names}
    if config.takes_texts:
        options |= open_text_encoder(dataset, config.data.text_encoder)
    if config.is_autoregressive:
        try:
            return CATPipeline(transformer, tokenizer, **options)
        except ValueError as error:  # such as other scales with as many tokens
            raise ConfigError(f"model: {error}") from error
    if config.loss.objective == "ddpm":
        scheduler = DDIMScheduler(**DIFFUSION_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
        if config.builds(UNet2DModel):
            return LightningDiTPipeline(transformer, tokenizer, scheduler, **options, prediction_type="epsilon")
        if not isinstance(tokenizer, AutoencoderKL):  # statistics are folded into its convolutions
            raise ConfigError(
                f"loss.objective=ddpm needs the latents of an AutoencoderKL, not of a {type(tokenizer).__name__}"
            )
        try:
            tokenizer = fold_latent_statistics(tokenizer)
        except ValueError as error:  # such as latents on a sphere
            raise ConfigError(f"loss.objective=ddpm: {error}") from error
        pipeline = DiTPipeline(transformer, tokenizer, scheduler, id2label=names)
        pipeline.register_to_config(id2label=names)  # DiTPipeline does not save its names otherwise
        return pipeline
    scheduler = flow_scheduler(config.sampling.solver, config.sampling.shift)
    return LightningDiTPipeline(transformer, tokenizer, scheduler, **options)


# Along the way --------------------------------------------------------------------------------------------------------


@contextmanager
def ema_pipeline(run: Run, pipeline: DiffusionPipeline, ema: Ema, to_be_saved: bool = False) -> Iterator[None]:
    """The pipeline with the EMA weights, in one piece and in eval mode; to be saved, they may stay on the CPU. All
    processes enter it."""
    transformer = ema.model
    transformer.eval()
    with ema:
        whole = gather_full_model(transformer)
        pipeline.register_modules(transformer=whole if to_be_saved else whole.to(run.device))
        yield
        pipeline.register_modules(transformer=transformer)


def sampling_options(config: GeneratorConfig, dataset: MomentsDataset | TokenDataset) -> dict[str, Any]:
    """What the pipeline is called with for the grid of samples, and the number of columns."""
    sampling, options = config.sampling, {"columns": 8}
    if not config.is_autoregressive:
        options["num_inference_steps"] = sampling.num_inference_steps
    shown, labels = range(sampling.num_images), list(range(len(dataset.classes)))
    if config.takes_texts:
        prompts = sampling.prompts
        if prompts is None:
            captions = first_captions(dataset.folder, dataset.manifest, sampling.num_images)
            prompts, indices = list(captions.values()), np.array(list(captions))
            labels = dataset.read(indices, np.zeros_like(indices))["label"].tolist()  # of these images
        options["prompt"] = [prompts[i % len(prompts)] for i in shown]
    if config.takes_classes:
        options["columns"] = min(len(dataset.classes), 8)
        options["class_labels"] = [labels[i % len(labels)] for i in shown]
    if not config.is_autoregressive:
        return options
    options["temperature"] = sampling.temperature
    if isinstance(dataset, TokenDataset):
        return {**options, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return {**options, "num_head_steps": sampling.num_inference_steps}


def save_samples(run: Run, pipeline: DiffusionPipeline, columns: int, **options: Any) -> None:
    """samples/step-N.png: the same conditions and the same noise each time."""
    if not run.is_main:
        return
    file = run.folder / "samples" / f"step-{run.step:07}.png"
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(run.config.seed)
    try:
        images = pipeline(**options, output_type="np", generator=generator).images
    except NonFiniteError as error:  # training itself looks for such values
        logging.getLogger(__name__).warning("step %d has no grid of samples: %s", run.step, error)
        return
    with atomic_path(file) as temporary:
        save_image(torch.from_numpy(images).permute(0, 3, 1, 2), temporary, nrow=columns)


def dry_run(config: GeneratorConfig, num_processes: int) -> None:
    """Prints the settings, the size of the generator and the length of the training, and checks what can be checked."""
    find_checkpoint_to_resume(config)
    with without_memory():
        transformer = build_model(config.model)
    num_images = config.data.num_images
    if config.data.latents is not None and Path(config.data.latents).exists():
        dataset = open_cache(config)
        check_shapes(config, transformer, dataset)
        num_images = len(dataset)
    shape, size = transformer.config, transformer.config.sample_size
    num_tokens = transformer.num_tokens if config.is_autoregressive else (size // shape.get("patch_size", 1)) ** 2
    channels = shape.latent_channels if config.is_autoregressive else shape.in_channels
    latent = "codes" if channels is None else f"{channels * size**2:,} floats per image"
    print(to_yaml(config))
    print(f"generator: {transformer.num_parameters():,} parameters, {num_tokens:,} tokens of {latent}")
    print(describe_run(config.train, num_images, num_processes))


def main(argv: list[str] | None = None) -> None:
    run_script(GeneratorConfig, str(__doc__), train, dry_run, argv)


if __name__ == "__main__":
    main()
