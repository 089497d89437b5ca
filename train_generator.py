#!/usr/bin/env python
"""Trains a generator on a latent cache: LightningDiT or DiT from classes, by flow matching or (DiT) diffusion; CAT from
texts, token by token.

    tokenizer first   python train_tokenizer.py ...; favae cache-latents ...
    for CAT, then     favae embed-captions --latents LATENTS --encoder minilm
    one process       python train_generator.py configs/generator/photos_lightningdit.yaml
    8 GPUs            accelerate launch --num_processes 8 train_generator.py CONFIG.yaml data.latents=LATENTS
    2 CPU processes   torchrun --nproc_per_node 2 train_generator.py CONFIG.yaml
    4 x 8 GPUs        torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                          train_generator.py CONFIG.yaml                      (on each of the four; HOST is one of them)
    with SLURM        srun --nodes 4 --ntasks-per-node 1 bash -c 'torchrun --nnodes 4 --nproc_per_node 8 \\
                          --rdzv_backend c10d --rdzv_id $SLURM_JOB_ID --rdzv_endpoint $(scontrol show hostnames \\
                          $SLURM_JOB_NODELIST | head -n 1):29500 train_generator.py CONFIG.yaml'
    what would run    python train_generator.py CONFIG.yaml --dry-run

Settings are `section.key=value`; the schema with its defaults is favae/training/config.py. The same command again goes
on from the newest complete checkpoint (resume=auto), bit for bit on a CPU. The run folder (output=..., by default
runs/<recipe>) holds config.yaml, metrics.jsonl, logs/ (TensorBoard), samples/ (guided, from the averaged weights),
checkpoints/step-N/ and, at the end, final/: a pipeline for `DiffusionPipeline.from_pretrained`, tokenizer included.
What one GPU cannot hold: train.shard=true divides parameters, optimiser and average among the processes (FSDP),
train.gradient_checkpointing=true computes activations twice; train.compile=true compiles each block.
With evaluation.every=K evaluation.reference=STATISTICS, FID and the other measures of the averaged weights go to
evaluation.jsonl every K steps, with the epochs that FID <= k took (EP_FID@k).
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torchvision.utils import save_image

from favae.adapters.diffusers import fold_latent_statistics
from favae.data.images import ImageDataset
from favae.data.latents import LatentsWithImages, MomentsDataset, TokenDataset, load_tokenizer, open_latents
from favae.data.sources import open_source
from favae.errors import ConfigError, hint
from favae.eval.online import OnlineEvaluation
from favae.foundation import FoundationModel
from favae.models.class_conditional import num_classes
from favae.pipelines import LightningDiTPipeline
from favae.training import text_to_image
from favae.training.config import GeneratorConfig, to_yaml
from favae.training.loop import Run
from favae.training.measure import describe_run
from favae.training.models import GENERATORS, build_model
from favae.training.objectives import DIFFUSION, AlignedTransformer, Objective, blocks_of
from favae.training.script import main
from favae.training.sharding import in_one_piece, shard
from favae.training.text_to_image import TextToImage, open_text_embeddings

ALIGNMENT_HINT = (
    "loss.alignment.weights=FILE takes a local file, loss.alignment.backbone=efficientnet-lite0 needs no network"
)


def dry_run(config: GeneratorConfig, num_processes: int) -> None:
    print(to_yaml(config))
    with torch.device("meta"):
        transformer = build_model(config.model, GENERATORS)
    shape, size = transformer.config, transformer.config.sample_size
    tokens = size**2 if config.from_text else (size // shape.patch_size) ** 2
    channels = shape.latent_channels if config.from_text else shape.in_channels
    what = "codes" if channels is None else f"{channels * size**2:,} floats per image"
    print(f"generator: {transformer.num_parameters():,} parameters, {tokens:,} tokens of {what}")
    images = config.data.num_images
    if config.data.latents is not None and Path(config.data.latents).exists():
        text_embeddings = open_text_embeddings(config) if config.from_text else None
        dataset = open_latents(config.data.latents, text_embeddings=text_embeddings)
        (text_to_image.check_shapes if config.from_text else check_shapes)(config, transformer, dataset)
        images = len(dataset)
    print(describe_run(config, images, num_processes))


def open_images(config: GeneratorConfig) -> ImageDataset | None:
    """The images behind the latents, at the cache's resolution, if their features are wanted."""
    data = config.data
    if not config.loss.alignment.weight:
        return None
    source = open_source(
        data.images,
        data.split,
        image_column=data.image_column,
        label_column=data.label_column,
        min_size=data.min_size,
    )
    return ImageDataset(source, open_latents(data.latents).manifest["resolution"])


class ClassToImage:
    """LightningDiT or DiT on a cache of latents; the counterpart of `TextToImage`.

    Raises:
        ConfigError: if the transformer was built for another latent shape, or for fewer classes.
    """

    def __init__(self, config: GeneratorConfig, tokenizer, dataset: MomentsDataset, transformer):
        self.config, self.dataset = config, dataset
        check_shapes(config, transformer, dataset)
        self.objective = Objective(config.loss, transformer)
        self.pipeline = make_pipeline(config, transformer, tokenizer, dataset)

    def loss(self, model, batch: dict, features: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(model, self.dataset.sample(batch), batch["label"], features)

    def samples(self) -> tuple[dict, int]:
        sampling, classes = self.config.sampling, len(self.dataset.classes)
        options = {"class_labels": [i % classes for i in range(sampling.num_images)]}
        options["num_inference_steps"] = sampling.num_inference_steps
        if isinstance(self.pipeline, LightningDiTPipeline):
            options["guidance_interval"] = tuple(sampling.guidance_interval)
        return options, min(classes, 8)


def check_shapes(config: GeneratorConfig, transformer, dataset: MomentsDataset | TokenDataset) -> None:
    """A generator is built for one latent shape and number of classes; the cache must have them."""
    built = transformer.config
    if isinstance(dataset, TokenDataset):
        raise ConfigError(f"{config.data.latents} holds tokens of a codebook, which are for a CATTransformerModel")
    expected = (built.in_channels, built.sample_size, built.sample_size)
    if dataset.latent_shape != expected:
        raise ConfigError(
            f"{config.data.latents} holds latents of shape {dataset.latent_shape}, "
            f"the generator is built for {expected} (model.in_channels, model.sample_size)"
        )
    classes = num_classes(transformer)
    if len(dataset.classes) > classes:
        name = "num_classes" if "num_classes" in built else "num_embeds_ada_norm"
        raise ConfigError(
            f"{config.data.latents} has {len(dataset.classes)} classes, the generator {classes} (model.{name})"
        )


def make_pipeline(config: GeneratorConfig, transformer, tokenizer, dataset: MomentsDataset) -> DiffusionPipeline:
    """What samples the transformer; its autoencoder carries the statistics that the latents were normalised with."""
    tokenizer.register_to_config(
        latents_mean=dataset.manifest["latents_mean"],
        latents_std=dataset.manifest["latents_std"],
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    names = dict(enumerate(dataset.classes))
    if config.loss.objective == "ddpm":
        scheduler = DDIMScheduler(**DIFFUSION, clip_sample=False)
        pipeline = DiTPipeline(transformer, fold_latent_statistics(tokenizer), scheduler, id2label=names)
        pipeline.register_to_config(id2label=names)  # which it forgets
        return pipeline
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.sampling.shift)
    return LightningDiTPipeline(transformer, tokenizer, scheduler, id2label=names)


def train(config: GeneratorConfig) -> None:
    run = Run(config)
    train = config.train
    for key in ("latents", "tokenizer"):
        if getattr(config.data, key) is None:
            raise ConfigError(f"data.{key} is missing")

    tokenizer = load_tokenizer(config.data.tokenizer)
    data, alignment = config.data, config.loss.alignment
    stop = train.steps if alignment.stop_step is None else alignment.stop_step
    aligned_until = stop if alignment.weight else 0
    text_embeddings = open_text_embeddings(config) if config.from_text else None
    dataset = open_latents(data.latents, tokenizer, flip=data.flip, text_embeddings=text_embeddings)
    images = open_images(config)
    aligned = dataset if images is None else LatentsWithImages(dataset, images)
    transformer = build_model(config.model, GENERATORS)
    task = (TextToImage if config.from_text else ClassToImage)(config, tokenizer, dataset, transformer)
    pipeline = task.pipeline.to(run.device)
    if train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    trained, modules, teacher = transformer, {"transformer": transformer}, None
    if alignment.weight:
        with hint(ALIGNMENT_HINT):
            teacher = FoundationModel(alignment.backbone, alignment.weights).to(run.device)
        trained = AlignedTransformer(transformer, alignment.layer, teacher.channels)
        modules["head"] = trained.head

    blocks = blocks_of(transformer)
    if train.compile:
        for block in blocks:
            block.compile()  # in place: names of weights stay, and one graph serves all blocks
    if train.shard:
        shard(transformer, blocks)
    layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    matrices = [layer.weight for layer in layers] if train.optimizer == "muon" else []
    run.add("generator", trained, train.learning_rate, matrices=matrices)
    model = run.prepare(modules, averaged=transformer)["generator"]
    evaluate = None
    if config.evaluation.every:
        size = transformer.config.sample_size * 2 ** (len(tokenizer.config.block_out_channels) - 1)
        evaluate = OnlineEvaluation(config.evaluation, run.folder, (size, size))
    run.resume()

    for batch in itertools.chain(run.batches(aligned, aligned_until), run.batches(dataset)):
        transformer.train()
        features = None
        if teacher is not None:
            trained.active = run.step < aligned_until
            features = teacher(batch["image"], (trained.grid, trained.grid)) if trained.active else None
        with run.accelerator.accumulate(model):
            loss, terms = task.loss(model, batch, features)
            finite = run.optimise("generator", loss)

        if run.end_step(terms, finite):
            if run.due(train.sample_every):
                with averaged(run, pipeline, transformer):
                    save_samples(run, pipeline, *task.samples())
            if run.due(config.evaluation.every):
                with averaged(run, pipeline, transformer):
                    metrics = evaluate(pipeline, run.step, run.epoch(dataset))
                run.accelerator.log({k: v for k, v in metrics.items() if v is not None}, step=run.step)
            if run.due(train.checkpoint_every):
                run.save_checkpoint()

    with averaged(run, pipeline, transformer):
        run.finish(pipeline.save_pretrained)


@contextlib.contextmanager
def averaged(run: Run, pipeline: DiffusionPipeline, transformer) -> Iterator[None]:
    """The pipeline with the averaged weights, in one piece, in eval mode; entered by all processes."""
    transformer.eval()
    with run.averaged():
        pipeline.register_modules(transformer=in_one_piece(transformer).to(run.device))
        yield
        pipeline.register_modules(transformer=transformer)


def save_samples(run: Run, pipeline: DiffusionPipeline, options: dict, columns: int) -> None:
    """samples/step-N.png: the same conditions and the same noise each time."""
    if not run.is_main:
        return
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    options |= {"guidance_scale": run.config.sampling.guidance_scale, "output_type": "np"}
    images = pipeline(**options, generator=torch.Generator().manual_seed(run.config.seed)).images
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    save_image(images, folder / f"step-{run.step:07}.png", nrow=columns)


if __name__ == "__main__":
    main(GeneratorConfig, __doc__, train, dry_run)
