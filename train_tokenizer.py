#!/usr/bin/env python
"""Trains a tokenizer: AutoencoderKLFA, VQModelFA, or a stock AutoencoderKL under the same loop.

    one process       python train_tokenizer.py configs/tokenizer/photos_favae.yaml
    8 GPUs            accelerate launch --num_processes 8 train_tokenizer.py CONFIG.yaml data.path=IMAGES
    2 CPU processes   torchrun --nproc_per_node 2 train_tokenizer.py CONFIG.yaml
    what would run    python train_tokenizer.py CONFIG.yaml --dry-run

Settings are `section.key=value`; the schema with its defaults is favae/training/config.py. The same command again goes
on from the newest complete checkpoint (resume=auto), bit for bit on a CPU. The run folder (output=..., by default
runs/<recipe>) holds config.yaml, metrics.jsonl, logs/ (TensorBoard), samples/ (original over reconstruction),
checkpoints/step-N/ and, at the end, final/: the autoencoder alone, for `from_pretrained`.
"""

import torch
from torchvision.utils import save_image

from favae.data.images import ImageDataset, skip_missing
from favae.data.sources import open_source
from favae.errors import ConfigError, hint
from favae.foundation import FoundationModel
from favae.losses.adversarial import PatchDiscriminator, hinge_discriminator_loss
from favae.losses.perceptual import LPIPS
from favae.losses.tokenizer_loss import TokenizerLoss
from favae.models import VQModelFA
from favae.training.config import TokenizerConfig, loss_at, to_yaml
from favae.training.loop import Run
from favae.training.measure import describe_run, describe_tokenizer
from favae.training.models import TOKENIZERS, build_model
from favae.training.script import main
from favae.training.trainee import TokenizerTrainee

ALIGNMENT_HINT = (
    "loss.alignment.weights=FILE takes a local file, loss.alignment.backbone=efficientnet-lite0 needs no network, "
    "loss.alignment.weight=0 does without"
)
PERCEPTUAL_HINT = "loss.perceptual_weights=FILE takes a local file, loss.perceptual=0 does without"


def dry_run(config: TokenizerConfig, num_processes: int) -> None:
    print(to_yaml(config))
    with torch.device("meta"):
        vae = build_model(config.model, TOKENIZERS)
        if config.adversarial_start is not None:
            discriminator = build_discriminator(config)
            print(f"discriminator: {discriminator.num_parameters():,} parameters")
    print(describe_tokenizer(vae.to("meta"), config.train.resolution))
    images = config.data.num_images
    if config.data.path is not None:
        images = len(open_data(config))
    print(describe_run(config, images, num_processes))


def build_discriminator(config: TokenizerConfig) -> PatchDiscriminator:
    settings = config.loss.adversarial
    return PatchDiscriminator(channels=settings.channels, num_layers=settings.num_layers)


def open_data(config: TokenizerConfig) -> ImageDataset:
    data = config.data
    if data.path is None:
        raise ConfigError("data.path is missing: photos, a folder, a .parquet file, or hf:NAME")
    source = open_source(
        data.path,
        data.split,
        image_column=data.image_column,
        label_column=data.label_column,
        min_size=data.min_size,
    )
    return ImageDataset(source, config.train.resolution, crop=data.crop, flip=data.flip)


def train(config: TokenizerConfig) -> None:
    run = Run(config)
    train = config.train
    stages = config.losses()
    losses = [loss for _, loss in stages]
    first = losses[0]

    # Data, models and frozen networks. What is missing is said here, before anything is written.
    dataset = open_data(config)
    vae = build_model(config.model, TOKENIZERS)
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    if train.resolution % stride:
        raise ConfigError(
            f"train.resolution must be a multiple of {stride} for this autoencoder, got {train.resolution}"
        )
    if train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    foundation = lpips = None
    with run.accelerator.main_process_first():  # one process downloads, the others find it
        if any(loss.alignment.weight for loss in losses):
            with hint(ALIGNMENT_HINT):
                foundation = FoundationModel(first.alignment.backbone, first.alignment.weights)
        if any(loss.perceptual for loss in losses):
            with hint(PERCEPTUAL_HINT):
                lpips = LPIPS(first.perceptual_weights)
    trainee = TokenizerTrainee(vae, losses, foundation.channels if foundation else None)
    run.add("generator", trainee, train.learning_rate, groups=trainee.parameter_groups())
    modules = {"tokenizer": vae}
    if trainee.projection is not None:
        modules["projection"] = trainee.projection
    if trainee.spectrum is not None:
        modules["spectrum"] = trainee.spectrum
    if isinstance(vae, VQModelFA):
        modules["codebook_statistics"] = trainee.codebook_statistics
    discriminator, adversarial_start = None, config.adversarial_start
    if adversarial_start is not None:
        discriminator = modules["discriminator"] = build_discriminator(config)
        rate = train.discriminator_learning_rate or train.learning_rate
        run.add("discriminator", discriminator, rate, first_step=adversarial_start)
    models = run.prepare(modules, averaged=vae)
    objective = TokenizerLoss(first, vae, foundation, lpips).to(run.device)
    run.resume()
    preview = skip_missing([dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // 16))][:16])

    for batch in run.batches(dataset):
        images = batch["image"]
        adversarial = discriminator is not None and run.step >= adversarial_start
        objective.config = trainee.config = loss_at(stages, run.step)
        trainee.train()
        with run.accelerator.accumulate(*models.values()):
            # Generator: reconstruct, judge, step. The discriminator's own weights get no gradient from this.
            output = models["generator"](images)
            if discriminator is not None:
                discriminator.requires_grad_(False)
            loss, terms = objective(images, output, discriminator if adversarial else None)
            finite = run.optimise("generator", loss)

            if adversarial:
                discriminator.requires_grad_(True)
                judge = models["discriminator"]
                loss = hinge_discriminator_loss(judge(output.target), judge(output.sample.detach()))
                terms["discriminator"] = loss.detach()
                finite = run.optimise("discriminator", loss) and finite

        if run.end_step(terms, finite):
            if run.due(train.sample_every) and run.is_main and preview is not None:
                save_preview(run, vae, preview["image"])
            if run.due(train.checkpoint_every):
                run.save_checkpoint()

    with run.averaged():
        run.finish(vae.save_pretrained)


@torch.no_grad()
def save_preview(run: Run, vae, images: torch.Tensor) -> None:
    """samples/step-N.png: originals above reconstructions, both from the middle of the training images."""
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    vae.eval()
    with run.averaged():
        reconstruction = vae(images.to(run.device)).sample.cpu()
    rows = torch.cat([images, reconstruction]).clamp(-1, 1)
    save_image(rows, folder / f"step-{run.step:07}.png", nrow=len(images), normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    main(TokenizerConfig, __doc__, train, dry_run)
