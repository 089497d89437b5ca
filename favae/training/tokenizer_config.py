"""The schema of train_tokenizer.py."""

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from favae.errors import ConfigError
from favae.losses.perceptual import SMALLEST_PERCEPTUAL
from favae.losses.stft import SMALLEST_SSIM
from favae.ranges import Count, Decay, Pixels, Probability, Rate, Step, Text, Workers
from favae.training.config import RunConfig, TrainConfig
from favae.training.models import FROM_AUTOENCODER_KL, NEED_TEACHER, TOKENIZERS, check_model, find_model_class
from favae.training.recipes import merge
from favae.training.tokenizer_losses import TokenizerLossConfig
from favae.training.validation import STRICT, validate


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
    channels_last: bool = False  # memory format of the weights of convolutions, which features take over
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
    def milestones(self) -> dict[str, int]:
        found = {f"stages[{i}].start_step": stage.start_step for i, stage in enumerate(self.stages)}
        found |= {"loss.adversarial.start_step": self.adversarial_start or 0}
        found |= {"train.fade_shortcut_steps": self.train.fade_shortcut_steps}
        return super().milestones | found

    @property
    def trained_parts(self) -> Literal["all", "encoder", "decoder"]:
        """Which parts of the model learn: of a student, the decoder alone if nothing asks for latents of its own."""
        stages = [loss for _, loss in self.loss_stages]
        is_idle = self.teacher.autoencoder is not None and not any(loss.latents for loss in stages)
        return "decoder" if self.train.parts == "all" and is_idle else self.train.parts

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
        for key in ("distillation", "reencoding"):
            if getattr(loss, key):
                raise ConfigError(f"loss.{key} needs teacher.autoencoder")
        for key, default in vars(TeacherConfig()).items():
            if getattr(config.teacher, key) != default:
                raise ConfigError(f"teacher.{key} needs teacher.autoencoder")
        return
    if config.train.parts == "encoder" and not loss.latents:
        raise ConfigError("train.parts=encoder learns from loss.latents alone where a teacher's latents are decoded")
    if config.teacher.latents is not None and (config.data.crop, config.data.color_jitter) != ("center", 0):
        raise ConfigError("teacher.latents are of whole images: set data.crop=center and data.color_jitter=0")
    if hasattr(find_model_class(name), "quantize"):
        raise ConfigError(f"teacher.autoencoder has continuous latents; those of a {name} are quantized")
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
    model, resolution, parts = config.model, config.train.resolution, config.train.parts
    model_class = find_model_class(model["name"])
    if loss.spectrum.weight and not (hasattr(model_class, "quantize") and model.get("frequency_complement", "conv")):
        raise ConfigError("loss.spectrum.weight needs a VQModelFA or HyperpriorModelFA with model.frequency_complement")
    for key in ("high_dropout", "high_noise"):
        if getattr(loss, key) and not hasattr(model_class, "low_latent_channels"):
            raise ConfigError(f"loss.{key} needs a model with high latents: model.name=AutoencoderKLFA")
    continuous = {"latent_noise": loss.latent_noise, **loss.shaping_latents}
    for key in (key for key, is_set in continuous.items() if is_set and hasattr(model_class, "quantize")):
        raise ConfigError(f"loss.{key} needs continuous latents; those of a {model['name']} are quantized")
    frozen = model.get(FROM_AUTOENCODER_KL) is not None
    freezing = f"model.{FROM_AUTOENCODER_KL}" if frozen else "train.parts=decoder"
    for name in ("alignment", "spectrum_matching"):
        if getattr(loss, name).weight and (frozen or parts == "decoder"):
            raise ConfigError(f"loss.{name}.weight needs an encoder that learns; {freezing} freezes it")
    if frozen and parts == "encoder":
        raise ConfigError(f"train.parts=encoder leaves nothing to train: {freezing} freezes the encoder")
    if parts != "encoder" and not loss.trains_decoder:
        raise ConfigError("nothing is compared with what is decoded: set loss.reconstruction, or another such loss")
    if parts == "encoder" and loss.adversarial.weight and loss.adversarial.adaptive:
        raise ConfigError(
            "loss.adversarial.adaptive looks at the decoder's last layer, which train.parts=encoder freezes; set it to "
            "false"
        )
    if config.train.mixed_precision == "fp16" and (loss.adversarial.weight or loss.has_adaptive_weights):
        raise ConfigError(
            "train.mixed_precision=fp16 has one gradient scale, and loss.adversarial and loss.alignment.adaptive need "
            "two; use bf16"
        )
    if config.train.shard and config.train.channels_last:
        raise ConfigError("train.shard divides weights in torch's own memory format; set train.channels_last=false")
    if config.train.shard and loss.has_adaptive_weights:
        raise ConfigError(
            "train.shard frees weights that adaptive weights need again; set loss.alignment.adaptive=false and "
            "loss.adversarial.adaptive=false, and their weights to what the adaptive factors made of them "
            f"(loss.adversarial.weight: at most {loss.adversarial.weight * loss.adversarial.max_weight:g})"
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
    if loss.perceptual and largest < SMALLEST_PERCEPTUAL:
        raise ConfigError(
            f"loss.perceptual needs images of {SMALLEST_PERCEPTUAL} px or more; the smallest that are compared have "
            f"{largest}"
        )
    if loss.ssim and largest < SMALLEST_SSIM:
        raise ConfigError(
            f"loss.ssim needs images of {SMALLEST_SSIM} px or more; the smallest that are compared have {largest}"
        )
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
