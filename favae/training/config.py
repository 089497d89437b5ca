"""The schema of both training scripts, and how a recipe becomes settings: defaults <- YAML file <- `key=value`."""

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from favae.errors import ConfigError
from favae.ranges import (
    Count,
    Decay,
    Pixels,
    Positive,
    Probability,
    Rate,
    Seed,
    Share,
    Shift,
    Step,
    Text,
    Weight,
    Workers,
)
from favae.training.class_to_image import GeneratorLossConfig
from favae.training.models import (
    FROM_AUTOENCODER_KL,
    GENERATORS,
    NEED_TEACHER,
    TOKENIZERS,
    check_model,
    find_model_class,
)
from favae.training.recipes import merge, read_settings
from favae.training.tokenizer_losses import TokenizerLossConfig
from favae.training.validation import STRICT, validate

# Both trainings -------------------------------------------------------------------------------------------------------


@dataclass(config=STRICT)
class TrainConfig:
    """Step counts are optimizer steps; batch_size is per process and per micro-batch."""

    steps: Count = 100_000
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    learning_rate: Rate = 1e-4
    optimizer: Literal["adamw", "muon"] = "adamw"  # "muon": for matrices (see docs/methods.md), AdamW for the rest
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: Weight = 0.0
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    lr_warmup_steps: Step = 0
    lr_num_cycles: Count = 1  # of cosine_with_restarts
    max_grad_norm: Positive | None = None
    ema_decay: Decay = 0.0  # 0: no average is kept
    ema_warmup: bool = True  # the decay is at most t / (9 + t) in step t; false: constant, as in most published code
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # each block with torch.compile
    shard: bool = False  # parameters, optimizer and EMA divided among the processes (FSDP)
    num_workers: Workers = 4
    log_every: Count = 100
    sample_every: Step = 5_000  # 0: never
    checkpoint_every: Count = 5_000
    checkpoints_total_limit: Count | None = 3
    max_skipped_steps: Step = 20  # non-finite steps in a row after which the run ends
    tracker: Literal["tensorboard", "wandb"] | None = "tensorboard"

    def __post_init__(self):
        if self.shard and self.mixed_precision == "fp16":
            raise ConfigError("train.shard has no gradient scaler for train.mixed_precision=fp16; use bf16")


@dataclass(config=STRICT)
class RunConfig:
    output: Text | None = None  # run folder; None: runs/<name of the recipe>
    seed: Seed = 0
    resume: Text = "auto"  # "auto": continue from the newest complete checkpoint; "never"; or a checkpoint's folder
    model: dict[str, Any] = field(default_factory=dict)  # name, and the arguments of its constructor
    train: TrainConfig = field(default_factory=TrainConfig)


# Tokenizers -----------------------------------------------------------------------------------------------------------


@dataclass(config=STRICT)
class ImageDataConfig:
    path: Text | None = None  # "photos", a folder, a .parquet or .tar file, or hf:NAME
    split: Text = "train"  # of photos, of hub datasets and of folders with splits in them
    image_column: Text = "auto"  # "image", or else the only column of images
    label_column: Text = "auto"  # "label", if there is such a column; "none": all images are of one class
    min_size: Count = 16  # images with a shorter side below this are skipped
    # Of "random" and "center", the shorter side is scaled to the resolution before; a "window" is not scaled.
    crop: Literal["random", "center", "window"] = "random"
    flip: bool = True
    color_jitter: Probability = 0.0  # j: brightness, contrast, saturation times 1 - j ... 1 + j, hue by j / 2 of a turn
    num_images: Count | None = None  # what the recipe was written for: steps per epoch in a dry run without the data


@dataclass(config=STRICT)
class TeacherConfig:
    """An autoencoder that stays as it is, and whose latents the model learns to decode."""

    autoencoder: Text | None = None  # a folder or hub name; of a saved pipeline, its vae
    latents: Text | None = None  # those of `data`, written by `favae cache-latents`: it encodes nothing then
    posterior: Literal["sample", "mode"] = "sample"  # of its latents
    normalize: bool = False  # its latents as generators see them, by the statistics in its config, as TAESD's are


@dataclass(config=STRICT)
class TokenizerTrainConfig(TrainConfig):
    resolution: Pixels = 256
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.5, 0.9])
    discriminator_learning_rate: Rate | None = None  # None: the same as learning_rate
    channels_last: bool = False  # memory format of images and convolutions
    parts: Literal["all", "encoder", "decoder"] = "all"  # what is trained; the rest stays as it is
    fade_shortcut_steps: Step = 0  # over so many steps, the shortcut of the model vanishes; 0: it stays


@dataclass(config=STRICT)
class TokenizerEvaluationConfig:
    """Metrics during training, of the EMA weights; see eval/online.py."""

    every: Step = 0  # steps; 0: never
    data: Text | None = None  # as data.path; images that are in no training
    split: Text = "validation"
    image_column: Text = "auto"
    label_column: Text = "auto"
    num_images: Count = 5_000  # at most, at even distances
    features: Text | None = "inception"  # or "dinov2", "efficientnet-lite0", any timm model; None: no rFID
    weights: Text | None = None  # a local file for `features`
    batch_size: Count = 32
    num_workers: Workers = 0

    def __post_init__(self):
        if self.every and self.data is None:
            raise ConfigError("evaluation.every needs evaluation.data: images that are in no training")


@dataclass(config=STRICT)
class StageConfig:
    """A change of the losses in the middle of a run."""

    start_step: Count = 1
    loss: dict[str, Any] = field(default_factory=dict)  # what differs from the stage before


@dataclass(config=STRICT)
class TokenizerConfig(RunConfig):
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    stages: list[StageConfig] = field(default_factory=list)
    evaluation: TokenizerEvaluationConfig = field(default_factory=TokenizerEvaluationConfig)
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)

    def __post_init__(self):
        check_model(self.model, TOKENIZERS)
        if self.train.fade_shortcut_steps and not self.model.get("shortcut"):
            raise ConfigError("train.fade_shortcut_steps needs a model with a shortcut: model.shortcut=overlapping")
        for _, loss in self.loss_stages:
            check_loss(loss, self)
            check_teacher(loss, self)

    @property
    def loss_stages(self) -> list[tuple[int, TokenizerLossConfig]]:
        """(first step, losses) of each stage, in order; the first stage begins at step 0.

        Raises:
            ConfigError: for stages out of order, or changes that are impossible.
        """
        stages = [(0, self.loss)]
        for i, stage in enumerate(self.stages):
            last_start, last_loss = stages[-1]
            if stage.start_step <= last_start:
                raise ConfigError(f"stages[{i}].start_step must be above {last_start}, got {stage.start_step}")
            changed = merge(dataclasses.asdict(last_loss), stage.loss, f"stages[{i}].loss")
            loss = validate(TokenizerLossConfig, changed, f"stages[{i}].loss")
            for key, value in self.loss.fixed_settings.items():
                if loss.fixed_settings[key] != value:
                    raise ConfigError(f"stages[{i}]: loss.{key} holds for the whole run; set it in loss")
            stages.append((stage.start_step, loss))
        return stages

    @property
    def adversarial_start(self) -> int | None:
        """The step from which a discriminator is trained; None if there is none."""
        starts = [
            max(start, loss.adversarial.start_step) for start, loss in self.loss_stages if loss.adversarial.weight
        ]
        return min(starts, default=None)


def losses_at(stages: list[tuple[int, TokenizerLossConfig]], step: int) -> TokenizerLossConfig:
    """The losses of the stage that optimizer step `step` belongs to."""
    return [loss for start, loss in stages if start <= step][-1]


def check_teacher(loss: TokenizerLossConfig, config: TokenizerConfig) -> None:
    """Raises ConfigError for a model that needs a teacher, or losses that do not go with one, or not without."""
    name = config.model["name"]
    if config.teacher.autoencoder is None:
        if name in NEED_TEACHER:
            raise ConfigError(f"teacher.autoencoder is missing: an {name} is trained to decode latents of another one")
        if loss.distillation:
            raise ConfigError("loss.distillation needs teacher.autoencoder, whose reconstruction is compared")
        if config.teacher.latents is not None:
            raise ConfigError("teacher.latents needs teacher.autoencoder, whose latents they are")
        return
    if config.teacher.latents is not None and (config.data.crop, config.data.color_jitter) != ("center", 0):
        raise ConfigError("teacher.latents are of whole images: set data.crop=center and data.color_jitter=0")
    if hasattr(find_model_class(name), "quantize"):
        raise ConfigError(f"teacher.autoencoder has continuous latents; a {name} has tokens")
    own_latents = {
        "alignment.weight": loss.alignment.weight,
        "spectrum.weight": loss.spectrum.weight,
        "high_dropout": loss.high_dropout,
        "high_noise": loss.high_noise,
        **loss.shaping_latents,
    }
    for key, is_set in own_latents.items():
        if is_set:
            raise ConfigError(f"loss.{key} changes latents, which are those of teacher.autoencoder here")


def check_loss(loss: TokenizerLossConfig, config: TokenizerConfig) -> None:
    """Raises ConfigError for losses that the model, the resolution or the precision does not allow."""
    model, resolution = config.model, config.train.resolution
    model_class = find_model_class(model["name"])
    if loss.spectrum.weight and not (hasattr(model_class, "quantize") and model.get("frequency_complement", "conv")):
        raise ConfigError("loss.spectrum.weight needs a VQModelFA with model.frequency_complement")
    for key in ("high_dropout", "high_noise"):
        if getattr(loss, key) and not hasattr(model_class, "low_latent_channels"):
            raise ConfigError(f"loss.{key} needs a model with high latents: model.name=AutoencoderKLFA")
    continuous = {"latent_noise": loss.latent_noise, **loss.shaping_latents}
    for key in (key for key, is_set in continuous.items() if is_set and hasattr(model_class, "quantize")):
        raise ConfigError(f"loss.{key} needs continuous latents; a {model['name']} has tokens")
    for name in ("alignment", "spectrum_matching"):
        if getattr(loss, name).weight and FROM_AUTOENCODER_KL in model:
            raise ConfigError(
                f"loss.{name}.weight needs an encoder that learns; model.{FROM_AUTOENCODER_KL} freezes it"
            )
    if config.train.mixed_precision == "fp16" and (loss.adversarial.weight or loss.has_adaptive_weights):
        raise ConfigError(
            "train.mixed_precision=fp16 has one gradient scale, and loss.adversarial and loss.alignment.adaptive need "
            "two; use bf16"
        )
    if config.train.shard and loss.has_adaptive_weights:
        raise ConfigError(
            "train.shard frees weights that adaptive weights need again; set loss.alignment.adaptive=false and "
            "loss.adversarial.adaptive=false"
        )
    smallest = round(3 * 2**loss.adversarial.num_layers / loss.smallest_scale)
    if loss.adversarial.weight and resolution < smallest:
        raise ConfigError(
            f"train.resolution must be at least {smallest} for loss.adversarial.num_layers, got {resolution}"
        )
    largest = int(resolution * loss.smallest_scale)
    if loss.stft.weight and loss.stft.window > largest:
        what = "a quarter of train.resolution, with loss.equivariance," if loss.equivariance else "train.resolution"
        raise ConfigError(f"loss.stft.window must be at most {what} = {largest}, got {loss.stft.window}")
    if loss.band.weight and resolution % 2**loss.band.levels:
        raise ConfigError(f"loss.band.levels={loss.band.levels} does not fit train.resolution = {resolution}")
    builders = {"stft": loss.stft.build, "spectrum": lambda: loss.spectrum.build(levels=1), "band": loss.band.build}
    for name, build in builders.items():
        try:  # what the losses' own constructors refuse
            build()
        except ValueError as error:
            raise ConfigError(f"loss.{name}: {error}") from error
    smallest, taps = largest // 2 ** (loss.band.levels - 1), loss.band.build().length
    if loss.band.weight and smallest < taps:
        raise ConfigError(
            f"loss.band.wavelet={loss.band.wavelet} has filters of {taps} pixels, and the smallest band that is split "
            f"with loss.band.levels={loss.band.levels} and train.resolution={resolution} has {smallest}"
        )


# Generators -----------------------------------------------------------------------------------------------------------


@dataclass(config=STRICT)
class LatentDataConfig:
    latents: Text | None = None  # a cache written by `favae cache-latents`
    tokenizer: Text | None = None  # the autoencoder that wrote it: a folder or hub name
    warmup_latents: Text | None = None  # of the same images, written with --low-pass: learned first (FreqWarm)
    warmup_steps: Step = 0  # how long
    flip: bool = True
    text_embeddings: Text | None = None  # written by `favae embed-captions`; None: the folder in that of the latents
    text_encoder: Text | None = None  # where the encoder of these embeddings is now; None: where it was
    images: Text | None = None  # what the cache was made of, for loss.alignment
    split: Text = "train"  # of `images`
    image_column: Text = "auto"
    label_column: Text = "auto"
    min_size: Count = 16
    num_images: Count | None = None  # what the recipe was written for: steps per epoch in a dry run without the cache


@dataclass(config=STRICT)
class GeneratorTrainConfig(TrainConfig):
    ema_decay: Decay = 0.9999
    learning_rate: Rate = 2e-4


@dataclass(config=STRICT)
class GuidanceConfig:
    """Classifier-free guidance, as LightningDiTPipeline takes it; a CATTransformerModel and a DiTPipeline take the
    scale alone."""

    guidance_scale: Weight = 1.0
    guidance_interval: Annotated[list[Probability], Field(min_length=2, max_length=2)] | None = None  # None: all times
    guidance_channels: Count | None = None  # the first so many latent channels, published 3; None: all

    @property
    def guidance(self) -> dict[str, Any]:
        """What a pipeline is called with."""
        options = {"guidance_interval": self.guidance_interval, "guidance_channels": self.guidance_channels}
        given = {name: value for name, value in options.items() if value is not None}
        return {"guidance_scale": self.guidance_scale, **given}


@dataclass(config=STRICT)
class SamplingConfig(GuidanceConfig):
    """Of the sample grids, and of the scheduler that is saved with the pipeline."""

    guidance_scale: Weight = 4.0
    num_inference_steps: Count = 50
    shift: Shift = 1.0  # the scheduler's; LightningDiT's timestep_shift s is 1 / s here
    num_images: Count = 16
    prompts: Annotated[list[str], Field(min_length=1)] | None = (
        None  # of the sample grids, with texts; None: captions of the first images
    )
    temperature: Weight = 1.0  # with texts, as the next two
    top_k: Count | None = None
    top_p: Share | None = None


@dataclass(config=STRICT)
class EvaluationConfig(GuidanceConfig):
    """Metrics during training, of the EMA weights; see eval/online.py."""

    every: Step = 0  # steps; 0: never
    reference: Text | None = None  # a file of `favae reference-statistics`, an .npz, or images
    features: Text = "inception"  # or "dinov2", "efficientnet-lite0", any timm model
    weights: Text | None = None  # a local file for `features`
    num_images: Count = 10_000  # fewer than a published FID's 50,000, and so higher than one
    num_inference_steps: Count = 50
    batch_size: Count = 32

    def __post_init__(self):
        if self.every and self.reference is None:
            raise ConfigError("evaluation.every needs evaluation.reference: statistics (.safetensors, .npz) or images")


@dataclass(config=STRICT)
class GeneratorConfig(RunConfig):
    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: GeneratorTrainConfig = field(default_factory=GeneratorTrainConfig)

    @property
    def from_text(self) -> bool:
        """Whether the generator is conditioned on texts rather than on classes."""
        return self.model["name"] == "CATTransformerModel"

    def __post_init__(self):
        check_model(self.model, GENERATORS)
        if self.from_text:
            self._check_text_to_image()
        else:
            self._check_class_to_image()
        scales = {"sampling": self.sampling.guidance_scale, "evaluation": self.evaluation.guidance_scale}
        for key in ("class_dropout_prob", "text_dropout_prob"):
            for section, scale in scales.items():
                if self.model.get(key) == 0 and scale != 1:
                    raise ConfigError(f"{section}.guidance_scale must be 1 with model.{key}=0: nothing trains the null")
        for section, settings in {"sampling": self.sampling, "evaluation": self.evaluation}.items():
            self._check_guidance(section, settings)

    def _check_guidance(self, section: str, settings: GuidanceConfig) -> None:
        interval, channels = settings.guidance_interval, settings.guidance_channels
        given = {"guidance_interval": interval, "guidance_channels": channels}
        if self.from_text or self.loss.objective == "ddpm":
            for key in (key for key, value in given.items() if value is not None):
                raise ConfigError(f"{section}.{key} is for generators that LightningDiTPipeline samples")
        if interval is not None and interval[0] > interval[1]:
            raise ConfigError(f"{section}.guidance_interval must rise, got {interval}")
        if channels is not None and channels > self.model.get("in_channels", 32):
            raise ConfigError(f"{section}.guidance_channels must be at most model.in_channels, got {channels}")

    def _check_text_to_image(self) -> None:
        class_only = {
            "loss.alignment.weight": self.loss.alignment.weight,
            "evaluation.every": self.evaluation.every,
            "data.warmup_latents": self.data.warmup_latents,
            "loss.objective": self.loss.objective != "flow_matching",
        }
        for key, is_set in class_only.items():
            if is_set:
                raise ConfigError(f"{key} is for generators of classes, not for a CATTransformerModel")
        if self.model.get("head") == "flow" and (self.sampling.top_k, self.sampling.top_p) != (None, None):
            raise ConfigError("sampling.top_k and sampling.top_p are for model.head=categorical")

    def _check_class_to_image(self) -> None:
        model, alignment = self.model, self.loss.alignment
        is_dit = model["name"] == "DiTTransformer2DModel"
        if self.loss.objective == "ddpm" and not is_dit:
            raise ConfigError("loss.objective=ddpm needs model.name=DiTTransformer2DModel")
        if self.loss.objective == "ddpm" and model.get("num_embeds_ada_norm", 1000) != 1000:
            raise ConfigError(
                "loss.objective=ddpm is sampled by DiTPipeline, whose null class is always 1000: "
                f"model.num_embeds_ada_norm must be 1000, got {model['num_embeds_ada_norm']}; fewer may be used"
            )
        channels = model.get("in_channels", 4)
        allowed = [channels, 2 * channels] if self.loss.objective == "ddpm" else [channels]
        if is_dit and model.get("out_channels", channels) not in allowed:
            raise ConfigError(
                f"model.out_channels must be {' or '.join(map(str, allowed))} for loss.objective="
                f"{self.loss.objective} and model.in_channels={channels}, got {model['out_channels']}"
            )
        if alignment.weight and not 1 <= alignment.layer <= model.get("num_layers", 28):
            raise ConfigError(f"loss.alignment.layer must be one of the model's layers, got {alignment.layer}")
        if (self.data.warmup_latents is None) != (self.data.warmup_steps == 0):
            raise ConfigError("data.warmup_latents and data.warmup_steps are set together")
        if alignment.weight and self.data.warmup_steps:
            raise ConfigError(
                "loss.alignment.weight needs images from the first step, and data.warmup_latents has none"
            )
        if alignment.weight and self.data.images is None:
            raise ConfigError("loss.alignment.weight needs data.images: the images that the latents were made of")


# Reading and writing --------------------------------------------------------------------------------------------------

Config = TypeVar("Config", bound=RunConfig)


def load_config(schema: type[Config], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults <- YAML file <- `key=value` overrides, as dataclasses.

    Raises:
        ConfigError: for a missing file, an unknown key, a wrong type or an impossible value.
    """
    settings, texts = read_settings(file, overrides)
    config = validate(schema, settings, texts=texts)
    config.output = config.output or f"runs/{Path(file).stem}"
    return config


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(TypeAdapter(type(config)).dump_python(config, mode="json"), sort_keys=False)
