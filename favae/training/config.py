"""The schema of both training scripts: dataclasses, merged as defaults <- YAML <- key=value, and checked."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from favae.errors import ConfigError
from favae.losses.tokenizer_loss import SpectrumConfig, STFTConfig, TokenizerLossConfig
from favae.training.checks import at_least, one_of
from favae.training.models import FROZEN, GENERATORS, TOKENIZERS, check_model
from favae.training.objectives import GeneratorLossConfig
from favae.wavelets import WaveletTransform2D


@dataclass
class ImageDataConfig:
    path: str | None = None  # "photos", a folder, a .parquet file, or hf:NAME
    split: str = "train"  # of photos and hub datasets
    image_column: str = "image"
    label_column: str = "label"
    min_size: int = 16  # a folder's images with a shorter side below this are skipped
    crop: str = "random"  # "random" or "center", after scaling the shorter side to the resolution
    flip: bool = True
    num_images: int | None = None  # what the recipe was written for: steps per epoch in a dry run without the data

    def __post_init__(self):
        one_of("data.crop", self.crop, ("random", "center"))
        at_least("data.min_size", self.min_size, 1)


@dataclass
class LatentDataConfig:
    latents: str | None = None  # a cache written by favae cache-latents
    tokenizer: str | None = None  # the autoencoder that wrote it: a folder or hub name
    flip: bool = True
    text_embeddings: str | None = None  # of the captions; None: the folder text_embeddings of the cache
    text_encoder: str | None = None  # where the encoder of these embeddings is now; None: where it was
    images: str | None = None  # what the cache was made of, for loss.alignment
    split: str = "train"  # of `images`
    image_column: str = "image"
    label_column: str = "label"
    min_size: int = 16
    num_images: int | None = None  # as above


@dataclass
class TrainConfig:
    """What both trainings share. Step counts are optimiser steps; batch_size is per process and per micro-batch."""

    steps: int = 100_000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    lr_scheduler: str = "constant_with_warmup"  # any name of diffusers.optimization.get_scheduler
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1  # of cosine_with_restarts
    max_grad_norm: float | None = None
    ema_decay: float = 0.0  # 0: no average is kept
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    num_workers: int = 4
    log_every: int = 100
    sample_every: int = 5_000  # 0: never
    checkpoint_every: int = 5_000
    checkpoints_total_limit: int | None = 3
    max_skipped_steps: int = 20  # non-finite steps in a row after which the run ends
    tracker: str | None = "tensorboard"

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "lr_num_cycles",
        ):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("lr_warmup_steps", "num_workers", "sample_every", "max_skipped_steps"):
            at_least(f"train.{name}", getattr(self, name), 0)
        if self.learning_rate <= 0:
            raise ConfigError(f"train.learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")
        if len(self.betas) != 2:
            raise ConfigError(f"train.betas must be two numbers, got {list(self.betas)}")
        if self.checkpoints_total_limit is not None:
            at_least("train.checkpoints_total_limit", self.checkpoints_total_limit, 1)
        one_of("train.mixed_precision", self.mixed_precision, ("no", "fp16", "bf16"))
        one_of("train.tracker", self.tracker, (None, "tensorboard", "wandb"))
        schedules = [kind.value for kind in diffusers.optimization.SchedulerType if kind.value != "piecewise_constant"]
        one_of("train.lr_scheduler", self.lr_scheduler, schedules)


@dataclass
class TokenizerTrainConfig(TrainConfig):
    resolution: int = 256
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])  # as VQGAN and VA-VAE
    discriminator_learning_rate: float | None = None  # None: as learning_rate


@dataclass
class GeneratorTrainConfig(TrainConfig):
    ema_decay: float = 0.9999
    learning_rate: float = 2e-4
    optimizer: str = "adamw"  # or "muon": for the matrices of the blocks, AdamW for the rest
    compile: bool = False  # each block with torch.compile
    shard: bool = False  # parameters, optimiser and average divided among the processes (FSDP)

    def __post_init__(self):
        super().__post_init__()
        if self.shard and self.mixed_precision == "fp16":
            raise ConfigError("train.shard has no gradient scaler for train.mixed_precision=fp16; use bf16")
        one_of("train.optimizer", self.optimizer, ("adamw", "muon"))


@dataclass
class SamplingConfig:
    """Of the sample grids, and the scheduler that is saved with the pipeline."""

    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # in time, 0 = noise
    shift: float = 1.0  # the scheduler's; LightningDiT's timestep_shift s is 1 / s here
    num_images: int = 16
    prompts: list[str] | None = None  # of the sample grids, with texts; None: captions of the first images
    temperature: float = 1.0  # with texts, as the next two
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        for name in ("num_inference_steps", "num_images"):
            at_least(f"sampling.{name}", getattr(self, name), 1)
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None:
            at_least("sampling.top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p must be above 0 and at most 1, got {self.top_p}")
        if len(self.guidance_interval) != 2:
            raise ConfigError(f"sampling.guidance_interval must be two numbers, got {list(self.guidance_interval)}")
        if self.shift <= 0:
            raise ConfigError(f"sampling.shift must be above 0, got {self.shift}")


@dataclass
class EvaluationConfig:
    """Metrics during training, on averaged weights; see eval/online.py."""

    every: int = 0  # steps; 0: never
    reference: str | None = None  # statistics (.safetensors, .npz) or images
    features: str = "inception"  # or "dinov2", "efficientnet-lite0", any timm model
    weights: str | None = None  # a local file for `features`
    num_images: int = 10_000  # fewer than a published FID's 50,000, and so higher than one
    guidance_scale: float = 1.0
    num_inference_steps: int = 50
    batch_size: int = 32

    def __post_init__(self):
        for name in ("num_images", "num_inference_steps", "batch_size"):
            at_least(f"evaluation.{name}", getattr(self, name), 1)
        at_least("evaluation.every", self.every, 0)
        if self.every and self.reference is None:
            raise ConfigError("evaluation.every needs evaluation.reference: statistics (.safetensors, .npz) or images")


@dataclass
class RunConfig:
    output: str | None = None  # run folder; None: runs/<name of the recipe>
    seed: int = 0
    resume: str = "auto"  # "auto": go on from the newest complete checkpoint; "never"; or a checkpoint's folder

    model: dict[str, Any] = field(default_factory=dict)


# What the loss is built with, and no stage can change.
FIXED = (
    "perceptual_weights",
    "alignment.backbone",
    "alignment.weights",
    "adversarial.channels",
    "adversarial.num_layers",
    *(f"spectrum.{f.name}" for f in dataclasses.fields(SpectrumConfig) if f.name not in ("weight", "detach_encoder")),
    *(f"stft.{f.name}" for f in dataclasses.fields(STFTConfig) if f.name != "weight"),
)


@dataclass
class StageConfig:
    """A change of the loss in the middle of a run."""

    start_step: int = 1
    loss: dict[str, Any] = field(default_factory=dict)  # what differs from the stage before


@dataclass
class TokenizerConfig(RunConfig):
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    stages: list[StageConfig] = field(default_factory=list)
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)

    def __post_init__(self):
        check_model(self.model, TOKENIZERS)
        at_least("train.resolution", self.train.resolution, 1)
        factor = 2 ** (len(self.model.get("block_out_channels", (0,) * 5)) - 1)
        if FROZEN not in self.model and self.train.resolution % factor:
            raise ConfigError(
                f"train.resolution must be a multiple of {factor} (model.block_out_channels), "
                f"got {self.train.resolution}"
            )
        if self.train.mixed_precision == "fp16" and self.adversarial_start is not None:
            raise ConfigError("train.mixed_precision=fp16 has one gradient scale and cannot serve two losses; use bf16")
        for _, loss in self.losses():
            if self.train.mixed_precision == "fp16" and loss.alignment.weight and loss.alignment.adaptive:
                raise ConfigError(
                    "train.mixed_precision=fp16 has no scale for the gradients that loss.alignment.adaptive compares; "
                    "use bf16, or loss.alignment.adaptive=false"
                )
            check_loss(loss, self.model, self.train.resolution)
            if loss.scale_equivariance and self.train.resolution < 2 * factor:
                raise ConfigError(f"loss.scale_equivariance needs train.resolution of at least {2 * factor}")

    def losses(self) -> list[tuple[int, TokenizerLossConfig]]:
        """(first step, loss) of each stage, in order; the first begins at 0.

        Raises:
            ConfigError: for stages out of order, or changes that the loss's schema refuses.
        """
        losses = [(0, self.loss)]
        for i, stage in enumerate(self.stages):
            previous, loss = losses[-1]
            if stage.start_step <= previous:
                raise ConfigError(f"stages[{i}].start_step must be above {previous}, got {stage.start_step}")
            for key in FIXED:
                section, _, name = key.rpartition(".")
                if name in (stage.loss.get(section) or {} if section else stage.loss):
                    raise ConfigError(f"stages[{i}]: loss.{key} holds for the whole run; set it in loss")
            try:
                merged = OmegaConf.merge(OmegaConf.structured(loss), stage.loss)
                losses.append((stage.start_step, OmegaConf.to_object(merged)))
            except OmegaConfBaseException as error:
                raise ConfigError(f"stages[{i}].loss.{error.full_key}: {str(error).splitlines()[0]}") from error
            except ValueError as error:
                raise ConfigError(f"stages[{i}]: {error}") from error
        return losses

    @property
    def adversarial_start(self) -> int | None:
        """The generator step from which a discriminator judges; None if it never does."""
        starts = [max(start, loss.adversarial.start_step) for start, loss in self.losses() if loss.adversarial.weight]
        return min(starts, default=None)


def loss_at(losses: list[tuple[int, TokenizerLossConfig]], step: int) -> TokenizerLossConfig:
    """The loss of the stage that optimiser step `step` belongs to."""
    return [loss for start, loss in losses if start <= step][-1]


def check_loss(loss: TokenizerLossConfig, model: dict, resolution: int) -> None:
    """Raises ConfigError for terms that the model or the resolution does not allow."""
    name = model["name"]
    split = name == "AutoencoderKLFA" and model.get("encoder_type", "wavelet") == "wavelet" and FROZEN not in model
    smallest = 3 * 2**loss.adversarial.num_layers
    if loss.adversarial.weight and resolution < smallest:
        raise ConfigError(
            f"train.resolution must be at least {smallest} for a discriminator of "
            f"{loss.adversarial.num_layers} layers (loss.adversarial.num_layers), got {resolution}"
        )
    if loss.spectrum.weight and not (split or name == "VQModelFA"):
        raise ConfigError(
            "loss.spectrum.weight needs an encoder with the decoder's features: a VQModelFA, or an AutoencoderKLFA "
            f"without model.encoder_type=image and model.{FROZEN}"
        )
    if loss.spectrum.weight and not model.get("frequency_complement", "conv" if name == "VQModelFA" else None):
        raise ConfigError("loss.spectrum.weight needs model.frequency_complement")
    if loss.high_dropout and not split:
        raise ConfigError("loss.high_dropout needs high latents: model.name=AutoencoderKLFA with its wavelet encoder")
    if loss.latent_noise and name == "VQModelFA":
        raise ConfigError("loss.latent_noise needs continuous latents, model.name=VQModelFA has none")
    if loss.alignment.weight and FROZEN in model:
        raise ConfigError(f"loss.alignment.weight needs an encoder that learns, model.{FROZEN} keeps it frozen")
    try:  # what their constructors refuse
        loss.stft.build()
        loss.spectrum.build(levels=1)
        WaveletTransform2D(loss.band.wavelet)
    except ValueError as error:
        raise ConfigError(f"loss: {error}") from error
    if loss.stft.weight and loss.stft.window > resolution:
        raise ConfigError(f"loss.stft.window must be at most train.resolution = {resolution}, got {loss.stft.window}")
    if loss.band.weight and resolution % 2**loss.band.levels:
        raise ConfigError(f"loss.band.levels={loss.band.levels} does not fit train.resolution = {resolution}")


@dataclass
class GeneratorConfig(RunConfig):
    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: GeneratorTrainConfig = field(default_factory=GeneratorTrainConfig)

    @property
    def from_text(self) -> bool:
        """Whether the generator is conditioned on texts, not on classes."""
        return self.model["name"] == "CATTransformerModel"

    def __post_init__(self):
        check_model(self.model, GENERATORS)
        if self.from_text:
            for key, asked in (
                ("loss.alignment.weight", self.loss.alignment.weight),
                ("evaluation.every", self.evaluation.every),
                ("loss.objective", self.loss.objective != "flow_matching"),
            ):
                if asked:
                    raise ConfigError(f"{key} is for generators of classes, not for a CATTransformerModel")
            if self.model.get("head") == "flow" and (self.sampling.top_k, self.sampling.top_p) != (None, None):
                raise ConfigError("sampling.top_k and sampling.top_p are for model.head=categorical")
            if self.model.get("text_dropout_prob") == 0 and self.sampling.guidance_scale != 1:
                raise ConfigError("sampling.guidance_scale must be 1 without dropped texts (model.text_dropout_prob=0)")
        dit = self.model["name"] == "DiTTransformer2DModel"
        channels = self.model.get("in_channels", 4)
        if self.loss.objective == "ddpm" and not dit:
            raise ConfigError("loss.objective=ddpm needs model.name=DiTTransformer2DModel")
        if self.loss.objective == "ddpm" and self.model.get("num_embeds_ada_norm", 1000) != 1000:
            raise ConfigError(
                "loss.objective=ddpm is sampled by DiTPipeline, whose null class is always 1000: "
                f"model.num_embeds_ada_norm must be 1000, got {self.model['num_embeds_ada_norm']}; fewer may be used"
            )
        allowed = (channels, 2 * channels) if self.loss.objective == "ddpm" else (channels,)
        if dit and self.model.get("out_channels", channels) not in allowed:
            raise ConfigError(
                f"model.out_channels must be {' or '.join(map(str, allowed))} for loss.objective="
                f"{self.loss.objective} and model.in_channels={channels}, got {self.model['out_channels']}"
            )
        if self.loss.alignment.weight:
            layers = self.model.get("num_layers", 28)
            one_of("loss.alignment.layer", self.loss.alignment.layer, range(1, layers + 1))
            if self.data.images is None:
                raise ConfigError("loss.alignment.weight needs data.images, what the latents were made of")
            if self.train.shard:
                raise ConfigError("loss.alignment.weight and train.shard do not go together")
        if self.model.get("class_dropout_prob") == 0 and self.sampling.guidance_scale != 1:
            raise ConfigError("sampling.guidance_scale must be 1 without a null class (model.class_dropout_prob=0)")
        if self.model.get("class_dropout_prob") == 0 and self.evaluation.guidance_scale != 1:
            raise ConfigError("evaluation.guidance_scale must be 1 without a null class (model.class_dropout_prob=0)")


# ----------------------------------------------------------------------------------------------------------------------


Config = TypeVar("Config", TokenizerConfig, GeneratorConfig)


def load_config(schema: type[Config], file: str | Path, overrides: list[str] = ()) -> Config:
    """Defaults <- YAML file <- `key=value` overrides, as dataclasses.

    Raises:
        ConfigError: for a missing file, an unknown key, a wrong type or an impossible value.
    """
    if not Path(file).is_file():
        raise ConfigError(f"{file}: no such file")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is not of the form key=value")
    try:
        recipe = OmegaConf.load(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except yaml.YAMLError as error:
        raise ConfigError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, DictConfig):
        raise ConfigError(f"{file}: expected a mapping of settings")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), recipe, changes)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(schema, error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    except ValueError as error:  # a section that checks itself
        raise ConfigError(str(error)) from error
    config.output = config.output or f"runs/{Path(file).stem}"
    return config


def _unknown_key(schema: type, error: ConfigKeyError) -> str:
    section, _, _ = (error.full_key or str(error.key)).rpartition(".")
    for name in filter(None, section.split(".")):
        fields = {f.name: f.default_factory for f in dataclasses.fields(schema)}
        schema = fields[name]
    allowed = ", ".join(f.name for f in dataclasses.fields(schema))
    return f"unknown key {error.full_key}; {section or 'the top level'} takes {allowed}"


def to_yaml(config: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))
