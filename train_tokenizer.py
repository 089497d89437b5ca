#!/usr/bin/env python
"""Trains a tokenizer: one of ours, or a stock AutoencoderKL under the same loop.

    one process       python train_tokenizer.py configs/tokenizer/photos_favae.yaml
    8 GPUs            accelerate launch --num_processes 8 train_tokenizer.py CONFIG.yaml data.path=IMAGES
    2 CPU processes   torchrun --nproc_per_node 2 train_tokenizer.py CONFIG.yaml
    what would run    python train_tokenizer.py CONFIG.yaml --dry-run

Settings are `section.key=value`; the schema with its defaults is favae/training/tokenizer_config.py. The same command
again continues from the newest complete checkpoint (resume=auto), bit for bit on a CPU. The run folder (output=..., by
default runs/<recipe>) holds config.yaml, metrics.jsonl, logs/ (TensorBoard), samples/ (originals over
reconstructions), checkpoints/step-N/ and, at the end, final/: the autoencoder alone, for `from_pretrained`.
With evaluation.every=K evaluation.data=IMAGES, PSNR, rFID and other metrics of the EMA weights, and metrics of how hard
their latents are for a generator, go to evaluation.jsonl every K steps.
"""

from typing import Any

import torch
from accelerate.utils import broadcast
from diffusers import ModelMixin
from torchvision.utils import save_image

from favae.autoencoders import decode, encode, image_channels, load_autoencoder, spatial_compression_ratio
from favae.bitstream import import_extra
from favae.channels import in_color
from favae.data.images import ImageDataset, read_in_order, skip_missing
from favae.data.latents import MomentsDataset, open_latents
from favae.data.latents_with_images import LatentsWithImages
from favae.data.sources import Selection, open_source
from favae.distributed import process_state
from favae.errors import ConfigError, hint, one_line
from favae.eval.online import TokenizerEvaluation
from favae.files import atomic_path
from favae.foundation import FoundationModel
from favae.losses.adversarial import PatchDiscriminator, hinge_discriminator_loss
from favae.losses.perceptual import LPIPS, cached_vgg16
from favae.models import HyperpriorModelFA
from favae.models.hyperprior_model_fa import SMALLEST_SIDE
from favae.models.linear_shortcut import share_left, shortcut_weights
from favae.normalization import NO_LATENT_STATISTICS, normalize_latents
from favae.training.command_line import run_script
from favae.training.config import to_yaml
from favae.training.dry_run import describe_run, describe_tokenizer, without_memory
from favae.training.latent_regularization import IMAGE_BLOCK
from favae.training.models import build_model, enable_gradient_checkpointing, lay_out_channels_last
from favae.training.optimization import (
    Ema,
    clip_gradients,
    create_optimizers,
    create_schedule,
    matrices_of,
    optimizer_step,
)
from favae.training.run import Run, find_checkpoint_to_resume
from favae.training.sharding import blocks_of, compile_blocks, gather_full_model, shard
from favae.training.tokenizer_config import TokenizerConfig, losses_at
from favae.training.tokenizer_losses import TokenizerLossConfig
from favae.training.tokenizer_module import TokenizerTrainingModule, last_layers
from favae.wavelets import WaveletBands

PRINCIPAL_IMAGES = 512  # in which the principal components of features are found


def train(config: TokenizerConfig) -> None:
    settings, stages, adversarial_start = config.train, config.loss_stages, config.adversarial_start
    run = Run(config)
    accelerator = run.accelerator

    # Data, the autoencoder and its losses. Whatever is missing is reported here, before anything is written.
    dataset = open_data(config)
    vae = build_tokenizer(config)
    freeze_parts(vae, config.trained_parts)
    dataset = dataset.with_channels(image_channels(vae))
    with accelerator.main_process_first():  # one process downloads, the others find it
        module = build_training_module(config, vae)
    if module.principal is not None and run.checkpoint is None:
        fit_principal_components(module, dataset, run.device)
    training_data, about = dataset, {"images": len(dataset)}
    if config.teacher.latents is not None:
        training_data = open_teacher_latents(config, module, dataset)
        about = training_data.dataset.about
    blocks = blocks_of(vae)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(vae)
    if settings.channels_last:
        lay_out_channels_last(module)
    if settings.compile:
        compile_blocks(blocks)
    if settings.shard:
        shard(module, blocks)

    # The optimizers: one for the autoencoder and what its losses learn, with Muon for its matrices if it is asked for;
    # one for the discriminator.
    matrices = matrices_of([vae]) if settings.optimizer == "muon" else []
    optimizers = create_optimizers(module.parameter_groups(), settings, settings.learning_rate, matrices)
    schedules = [create_schedule(optimizer, settings) for optimizer in optimizers]
    model, optimizers = run.prepare(module, optimizers)
    parts, trained = module.trained_parts(), [model]
    discriminator, d_optimizers, d_schedules = None, [], []
    if adversarial_start is not None:
        discriminator = parts["discriminator"] = build_discriminator(config)
        rate = settings.discriminator_learning_rate or settings.learning_rate
        d_optimizers = create_optimizers([{"params": discriminator.parameters()}], settings, rate)
        d_schedules = [create_schedule(optimizer, settings, adversarial_start) for optimizer in d_optimizers]
        d_model, d_optimizers = run.prepare(discriminator, d_optimizers)
        trained.append(d_model)
    ema = Ema(vae, settings.ema_decay, run.device, warmup=settings.ema_warmup)
    evaluate = open_evaluation(config, run, module) if config.evaluation.every else None
    run.start(parts, ema, optimizers + d_optimizers, schedules + d_schedules, about)
    preview = skip_missing([dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // 16))[:16]])

    for batch in run.batches(training_data):
        images, teacher_moments = batch["image"], None
        if "mean" in batch:
            teacher_moments = torch.cat([batch["mean"], batch["logvar"].expand_as(batch["mean"])], dim=1)
        losses = losses_at(stages, run.step)
        adversarial = losses.adversarial.weight > 0 and run.step >= losses.adversarial.start_step
        model.train()
        with accelerator.accumulate(*trained):
            # 1. Forward: reconstruct the images and add up the losses. The discriminator judges and does not learn.
            if discriminator is not None:
                discriminator.requires_grad_(False)
            judge = discriminator if adversarial else None
            loss, logs, reconstruction, target = model(images, losses, judge, teacher_moments)

            # 2. Backward.
            accelerator.backward(loss)

            if accelerator.sync_gradients:
                # 3. Clip the gradient. If it is not finite, the step is skipped by every process.
                finite = clip_gradients(accelerator, model, settings.max_grad_norm)

                # 4. Optimizer step. A shortcut that fades is a little smaller after it.
                optimizer_step(accelerator, optimizers, schedules, finite)
                if settings.fade_shortcut_steps:
                    ema.multiply(shortcut_weights(vae), share_left(run.step, settings.fade_shortcut_steps))

                # 5. Moving average of the weights.
                if finite:
                    ema.step()

            # 6. The discriminator's step: forward, backward, clip, optimizer.
            if adversarial:
                discriminator.requires_grad_(True)
                d_loss = hinge_discriminator_loss(d_model(target), d_model(reconstruction.detach()))
                accelerator.backward(d_loss)
                logs["discriminator"] = d_loss.detach()
                if accelerator.sync_gradients:
                    d_finite = clip_gradients(accelerator, d_model, settings.max_grad_norm)
                    optimizer_step(accelerator, d_optimizers, d_schedules, d_finite)
                    finite = finite and d_finite

        run.collect(logs)
        if accelerator.sync_gradients:
            run.end_step(finite)
            if run.checkpoint_due():  # before what takes long
                run.save_checkpoint()
            if run.due(settings.sample_every) and preview is not None:
                with ema:
                    save_preview(run, gather_full_model(vae), module, preview["image"])
            if evaluate is not None and run.due(config.evaluation.every):
                with ema:
                    metrics = evaluate(gather_full_model(vae), run.step, run.epoch(training_data))
                accelerator.log({k: v for k, v in metrics.items() if v is not None}, step=run.step)

    with ema:
        run.finish(gather_full_model(vae).save_pretrained)


def open_data(config: TokenizerConfig) -> ImageDataset:
    data = config.data
    if data.path is None:
        raise ConfigError("data.path is missing: photos, a folder, a .parquet file, or hf:NAME")
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    source = open_source(data.path, data.split, min_size=data.min_size, **columns)
    views = {"crop": data.crop, "flip": data.flip, "color_jitter": data.color_jitter}
    return ImageDataset(source, config.train.resolution, **views)


def build_tokenizer(config: TokenizerConfig) -> ModelMixin:
    """Raises ConfigError or ModelError if the images or their size do not suit the autoencoder."""
    vae, resolution = build_model(config.model), config.train.resolution
    if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise ConfigError(f"model.name: a {type(vae).__name__} is no autoencoder, it has no encode and decode")
    missing = [name for name in ("encoder", "decoder") if not hasattr(vae, name)]
    missing += [] if "latent_channels" in vae.config else ["latent_channels in its config"]
    if missing:
        raise ConfigError(f"model.name: a {type(vae).__name__} has no {', '.join(missing)}, and cannot be trained here")
    image_channels(vae)  # refuses numbers that mean nothing
    if config.train.fade_shortcut_steps and not vae.config.get("shortcut"):
        raise ConfigError("train.fade_shortcut_steps needs a model with a shortcut: model.shortcut=overlapping")
    ratio, side = spatial_compression_ratio(vae), resolution
    if any(losses.scale_equivariance for _, losses in config.loss_stages):
        ratio, side = ratio * 2, side // 2  # the half-size latent must be one too
    if resolution % ratio:
        raise ConfigError(f"train.resolution must be a multiple of {ratio} for this model and loss, got {resolution}")
    if vae.config.get("quantizer") in ("next_scale", "next_band") and resolution != ratio * vae.config.scales[-1]:
        size = ratio * vae.config.scales[-1]
        raise ConfigError(f"train.resolution must be {size} for model.scales={vae.config.scales}, got {resolution}")
    if isinstance(vae, HyperpriorModelFA) and resolution < SMALLEST_SIDE * ratio:
        raise ConfigError(f"train.resolution must be {SMALLEST_SIDE * ratio} or more for this model, got {resolution}")
    side = min(side, max(ratio, int(resolution * min(losses.smallest_scale for _, losses in config.loss_stages))))
    for bands in (module for module in vae.modules() if isinstance(module, WaveletBands)):
        smallest, taps = side // 2 ** (bands.levels - 1), bands.transform.length
        if smallest < taps:
            raise ConfigError(
                f"model.wavelet={bands.transform.wavelet} has filters of {taps} pixels, and at train.resolution="
                f"{resolution} the smallest band that it splits has {smallest}"
            )
    for _, losses in config.loss_stages:
        check_latents(losses, vae, resolution)
    return vae


def check_latents(losses: TokenizerLossConfig, vae: ModelMixin, resolution: int) -> None:
    """Raises ConfigError if what the losses do with latents does not suit their shape."""
    ratio = spatial_compression_ratio(vae)
    channels, side, masking = vae.config.latent_channels, resolution // ratio, losses.frequency_masking
    if masking.probability and (side % masking.latent_block or resolution % IMAGE_BLOCK):
        raise ConfigError(
            f"loss.frequency_masking.latent_block={masking.latent_block} does not divide latents of {side} x {side}, "
            f"or {IMAGE_BLOCK} does not divide train.resolution={resolution}"
        )
    if losses.spectrum_matching.weight and side < 2:
        raise ConfigError("loss.spectrum_matching.weight needs latents of 2 x 2 or more: a larger train.resolution")
    if losses.prefix.widths is not None and max(losses.prefix.widths) >= channels:
        raise ConfigError(
            f"loss.prefix.widths must be below the {channels} latent channels, got {losses.prefix.widths}"
        )
    if losses.alignment.weight and losses.alignment.channels not in ("low", "all", *range(1, channels + 1)):
        raise ConfigError(
            f"loss.alignment.channels must be at most the {channels} latent channels, got {losses.alignment.channels}"
        )
    if losses.equivariance and losses.band.weight and ratio % 2**losses.band.levels:
        raise ConfigError(
            f"loss.band.levels={losses.band.levels} does not fit images that loss.equivariance makes smaller by steps "
            f"of {ratio} pixels"
        )


def build_training_module(config: TokenizerConfig, vae: ModelMixin) -> TokenizerTrainingModule:
    """Opens the frozen networks that a stage of the training needs, and joins them with the autoencoder."""
    stages = [losses for _, losses in config.loss_stages]
    for losses in stages:
        for part, loss in {vae.encoder: losses.alignment, vae.decoder: losses.adversarial}.items():
            if loss.weight and loss.adaptive:
                last_layers(part)  # refuses a network whose last layer is not known
    teacher = lpips = None
    if any(losses.alignment.weight for losses in stages):
        alignment = config.loss.alignment
        with hint(
            "loss.alignment.weights=FILE takes a local file, loss.alignment.backbone=efficientnet-lite0 needs no "
            "network, loss.alignment.weight=0 does without"
        ):
            teacher = FoundationModel(alignment.backbone, alignment.weights)
    if any(losses.perceptual for losses in stages):
        with hint("loss.perceptual_weights=FILE takes a local file, loss.perceptual=0 does without"):
            lpips = LPIPS(config.loss.perceptual_weights)
    latent_teacher = None
    if config.teacher.autoencoder is not None:
        latent_teacher = open_latent_teacher(config, vae)
        vae.register_to_config(**statistics_for(vae, latent_teacher, config.teacher.normalize))
    return TokenizerTrainingModule(
        vae, stages, teacher, lpips, latent_teacher, config.teacher.posterior, config.teacher.normalize
    )


def fit_principal_components(module: TokenizerTrainingModule, dataset: ImageDataset, device: torch.device) -> None:
    """Finds the directions of the features that latents are aligned to, in images at even distances."""
    ratio = spatial_compression_ratio(module.vae)
    grid = (dataset.resolution // ratio, dataset.resolution // ratio)
    images = ImageDataset(Selection(dataset.source, PRINCIPAL_IMAGES), dataset.resolution, channels=dataset.channels)
    teacher = module.teacher.to(device)
    if process_state().is_main_process:
        features = [teacher(batch["image"].to(device), grid).cpu() for batch in read_in_order(images, 64)]
        module.principal.fit(torch.cat(features))
    for buffer in module.principal.buffers():  # every process could find directions of other signs
        buffer.copy_(broadcast(buffer.to(device)))


def open_latent_teacher(config: TokenizerConfig, vae: ModelMixin) -> ModelMixin:
    """Raises ConfigError if its images or latents do not have the shape of the model's."""
    resolution, side = config.train.resolution, config.train.resolution // spatial_compression_ratio(vae)
    with hint("teacher.autoencoder is a folder or a hub name"):
        teacher = load_autoencoder(config.teacher.autoencoder)
        channels = image_channels(teacher)
    try:
        encoded = encode(teacher, torch.zeros(1, channels, resolution, resolution))
        latents = tuple((normalize_latents(teacher, encoded) if config.teacher.normalize else encoded).shape[1:])
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"teacher.autoencoder takes no images of {resolution} px: {one_line(error)}") from error
    expected = (vae.config.latent_channels, side, side)
    if latents != expected or channels != image_channels(vae):
        raise ConfigError(
            f"teacher.autoencoder has images of {channels} channels and, at train.resolution={resolution}, latents of "
            f"shape {latents}; the model has {image_channels(vae)} channels and {expected}"
        )
    return teacher


def statistics_for(vae: ModelMixin, teacher: ModelMixin, normalized: bool) -> dict[str, Any]:
    """What the config of a model of the teacher's latents says about them, as far as it has a place for it."""
    own = {key: teacher.config.get(key, value) for key, value in NO_LATENT_STATISTICS.items()}
    statistics = NO_LATENT_STATISTICS if normalized else own
    return {key: value for key, value in statistics.items() if key in vae.config}


def open_teacher_latents(
    config: TokenizerConfig, module: TokenizerTrainingModule, dataset: ImageDataset
) -> LatentsWithImages:
    """Raises ConfigError if they are no moments of images of this resolution, CacheError if of another teacher or other
    images."""
    with hint("`favae cache-latents` writes teacher.latents with teacher.autoencoder"):
        latents = open_latents(config.teacher.latents, module.latent_teacher, flip=config.data.flip)
    if latents.manifest["resolution"] != config.train.resolution:
        raise ConfigError(
            f"teacher.latents are of images of {latents.manifest['resolution']} px, and train.resolution is "
            f"{config.train.resolution}"
        )
    if not isinstance(latents, MomentsDataset) or latents.manifest.get("low_pass") is not None:
        raise ConfigError("teacher.latents must be moments of whole images, not tokens, and written without --low-pass")
    return LatentsWithImages(latents, dataset)


def freeze_parts(vae: ModelMixin, trained: str) -> None:
    """Keeps what is not trained as it is: "encoder" or "decoder" is, or "all".

    All but the decoder and `post_quant_conv` belongs to the encoder, such as what quantizes latents, and the models of
    their entropy: tokens stay the same. So do compressed images, but for the hash of all weights in their files.
    """
    for name, parameter in vae.named_parameters():
        part = "decoder" if name.split(".")[0] in ("decoder", "post_quant_conv") else "encoder"
        if trained not in ("all", part):
            parameter.requires_grad_(False)


def build_discriminator(config: TokenizerConfig) -> PatchDiscriminator:
    settings = config.loss.adversarial
    return PatchDiscriminator(channels=settings.channels, num_layers=settings.num_layers)


def open_evaluation(config: TokenizerConfig, run: Run, module: TokenizerTrainingModule) -> TokenizerEvaluation:
    """Raises MissingWeights, DataError or ModelError if the images, the networks that look at them, or the coder that
    counts bits, cannot be opened."""
    if isinstance(module.vae, HyperpriorModelFA):
        import_extra("constriction")
    lpips = module.lpips
    if lpips is None and (config.loss.perceptual_weights or cached_vgg16()):
        lpips = LPIPS(config.loss.perceptual_weights or cached_vgg16()).to(run.device)
    with hint("evaluation.weights=FILE takes a local file, evaluation.features=efficientnet-lite0 needs no network"):
        return TokenizerEvaluation(
            config.evaluation,
            run.folder,
            resolution=config.train.resolution,
            channels=image_channels(module.vae),
            lpips=lpips,
            encode=lambda vae, images, indices: module.latents_of(vae, images),
        )


@torch.no_grad()
def save_preview(run: Run, vae: ModelMixin, module: TokenizerTrainingModule, images: torch.Tensor) -> None:
    """samples/step-N.png: originals above what is decoded, of the teacher's latents if there is one."""
    if not run.is_main:
        return
    file = run.folder / "samples" / f"step-{run.step:07}.png"
    vae = vae.to(run.device).eval()  # of a sharded model, a copy in the CPU's memory
    reconstruction = decode(vae, module.latents_of(vae, images.to(run.device))).cpu()
    rows = in_color(torch.cat([images, reconstruction]).clamp(-1, 1))
    with atomic_path(file) as temporary:
        save_image(rows, temporary, nrow=len(images), normalize=True, value_range=(-1, 1))


def dry_run(config: TokenizerConfig, num_processes: int) -> None:
    """Prints the settings, the size of the models and the length of the training, and checks what can be checked."""
    find_checkpoint_to_resume(config)
    with without_memory():
        vae = build_tokenizer(config).to("meta")
        discriminator = build_discriminator(config) if config.adversarial_start is not None else None
    num_images = config.data.num_images if config.data.path is None else len(open_data(config))
    print(to_yaml(config))
    if discriminator is not None:
        print(f"discriminator: {discriminator.num_parameters():,} parameters")
    print(describe_tokenizer(vae, config.train.resolution))
    print(describe_run(config.train, num_images, num_processes))


def main(argv: list[str] | None = None) -> None:
    run_script(TokenizerConfig, str(__doc__), train, dry_run, argv)


if __name__ == "__main__":
    main()
