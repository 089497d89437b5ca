"""The schema of train_generator.py."""

from collections.abc import Sequence
from dataclasses import field
from inspect import signature
from typing import Annotated, Any, Literal

from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from pydantic import Field
from pydantic.dataclasses import dataclass

from favae import CATTransformerModel, LightningDiTTransformer2DModel
from favae.errors import ConfigError
from favae.pipelines.solvers import Solver
from favae.ranges import Count, Decay, Probability, Rate, Share, Shift, Step, Text, Weight
from favae.training.config import RunConfig, TrainConfig
from favae.training.diffusion import GeneratorLossConfig
from favae.training.models import GENERATORS, check_model, find_model_class, inherit_settings
from favae.training.validation import STRICT

FOR_FLOWS = ("loss.time_sampling", "loss.time_shift", "loss.cosine_weight", "sampling.solver", "sampling.shift")
FOR_TOKENS = ("sampling.temperature", "sampling.top_k", "sampling.top_p")


@dataclass(config=STRICT)
class LatentDataConfig:
    latents: Text | None = None  # a cache written by `favae cache-latents`
    tokenizer: Text | None = None  # the autoencoder that wrote it: a folder or hub name
    warmup_latents: Text | None = None  # of the same images, written with --low-pass: learned first (FreqWarm)
    warmup_steps: Step = 0  # how long
    flip: bool = True
    normalization: Literal["per_channel", "global"] = "per_channel"  # std 1 of each channel; of all channels together
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
    solver: Solver = "euler"  # see `flow_scheduler`
    num_images: Count = 16
    prompts: Annotated[list[str], Field(min_length=1)] | None = (
        None  # of the sample grids, with texts; None: captions of the first images
    )
    temperature: Weight = 1.0  # of a CATTransformerModel, as the next two
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
    num_inference_steps: Count | None = None  # None: 50, or 25 per token of CAT's flow head
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
    def milestones(self) -> dict[str, int]:
        stop_step = self.loss.alignment.stop_step if self.loss.alignment.weight else None
        return super().milestones | {
            "data.warmup_steps": self.data.warmup_steps,
            "loss.alignment.stop_step": stop_step or 0,
        }

    def builds(self, model_class: type[ModelMixin]) -> bool:
        """Whether the generator is of this class, or of one's own that is derived from it."""
        return issubclass(find_model_class(self.model["name"]), model_class)

    @property
    def is_autoregressive(self) -> bool:
        """Whether tokens are learned one by one, as CAT does, rather than by flow matching or diffusion."""
        return self.builds(CATTransformerModel)

    @property
    def takes_texts(self) -> bool:
        """Whether the generator is conditioned on texts."""
        if self.is_autoregressive:
            return not self.model.get("num_classes")
        return self.model.get("text_dim") is not None

    @property
    def takes_classes(self) -> bool:
        """Whether the generator is conditioned on classes; LightningDiT may be on both."""
        return not self.takes_texts if self.is_autoregressive else self.model.get("num_classes") != 0

    @property
    def _in_channels(self) -> int:
        """What the recipe says, or the default of the class, which need not name its arguments if it is one's own."""
        return self.model.get("in_channels", 4 if self.builds(DiTTransformer2DModel) else 32)

    def __post_init__(self):
        check_model(self.model, GENERATORS)
        self.model = inherit_settings(self.model)
        if self.is_autoregressive:
            self._check_autoregressive()
        else:
            self._check_diffusion()
        if not self.takes_texts:
            self._refuse(
                ["sampling.prompts", "data.text_embeddings", "data.text_encoder"], "is for generators of texts"
            )
        if self.is_autoregressive or self.loss.objective == "ddpm":
            self._refuse(FOR_FLOWS, "is for flow matching")
        prompts, shown = self.sampling.prompts or [], self.sampling.num_images
        if len(prompts) > shown:
            raise ConfigError(f"sampling.prompts are {len(prompts)}, more than sampling.num_images={shown}")
        if self.takes_texts and self.evaluation.every:
            raise ConfigError("evaluation.every is for generators of classes, not for model.text_dim")
        scales = {"sampling": self.sampling.guidance_scale, "evaluation": self.evaluation.guidance_scale}
        conditions = {
            "class_dropout_prob": self.takes_classes,
            "text_dropout_prob": self.takes_texts or self.is_autoregressive,
        }
        dropped = {f"model.{key}": self.model.get(key) for key, taken in conditions.items() if taken}
        if self.builds(DiTTransformer2DModel) or self.builds(UNet2DModel):
            dropped["loss.class_dropout_prob"] = self.loss.class_dropout_prob
        for key in (key for key, probability in dropped.items() if probability == 0):
            for section in (section for section, scale in scales.items() if scale != 1):
                raise ConfigError(f"{section}.guidance_scale must be 1 with {key}=0: nothing trains the null")
        for section, settings in {"sampling": self.sampling, "evaluation": self.evaluation}.items():
            self._check_guidance(section, settings)

    def _check_guidance(self, section: str, settings: GuidanceConfig) -> None:
        interval, channels = settings.guidance_interval, settings.guidance_channels
        given = {"guidance_interval": interval, "guidance_channels": channels}
        has_pipeline_of_dit = self.loss.objective == "ddpm" and self.builds(DiTTransformer2DModel)
        if self.is_autoregressive or has_pipeline_of_dit:
            for key in (key for key, value in given.items() if value is not None):
                raise ConfigError(f"{section}.{key} is for generators that LightningDiTPipeline samples")
        if has_pipeline_of_dit and settings.guidance_scale < 1:
            raise ConfigError(
                f"{section}.guidance_scale must be at least 1 for DiTPipeline, got {settings.guidance_scale}"
            )
        if interval is not None and interval[0] > interval[1]:
            raise ConfigError(f"{section}.guidance_interval must rise, got {interval}")
        if channels is not None and channels > self._in_channels:
            raise ConfigError(f"{section}.guidance_channels must be at most model.in_channels, got {channels}")

    def _refuse(self, keys: Sequence[str], why: str) -> None:
        """Raises ConfigError for the first of these settings that is not the default."""
        for key in keys:
            section, _, name = key.partition(".")
            settings = getattr(self, section)
            if getattr(settings, name) != getattr(type(settings)(), name):
                raise ConfigError(f"{key} {why}")

    def _check_autoregressive(self) -> None:
        self._refuse(["loss.class_dropout_prob"], "is model.text_dropout_prob here")
        not_for_tokens = {
            "loss.alignment.weight": self.loss.alignment.weight,
            "data.warmup_latents": self.data.warmup_latents,
            "data.warmup_steps": self.data.warmup_steps,
            "loss.objective": self.loss.objective != "flow_matching",
        }
        for key, is_set in not_for_tokens.items():
            if is_set:
                raise ConfigError(f"{key} is not for a CATTransformerModel")
        if self.model.get("head") != "flow":
            self._refuse(["sampling.num_inference_steps", "evaluation.num_inference_steps"], "is for model.head=flow")
        if self.model.get("head") == "flow" and (self.sampling.top_k, self.sampling.top_p) != (None, None):
            raise ConfigError("sampling.top_k and sampling.top_p are for model.head=categorical")

    def _check_unet(self) -> None:
        for key in ("in_channels", "out_channels", "sample_size", "num_class_embeds"):
            if self.model.get(key) is None:
                raise ConfigError(f"model.{key} is missing: of the latents, or one more than the classes")
        if not isinstance(self.model["sample_size"], int):
            raise ConfigError("model.sample_size must be one number: latents are square")
        widths = self.model.get("block_out_channels") or signature(UNet2DModel).parameters["block_out_channels"].default
        halvings = len(widths) - 1
        if self.model["sample_size"] % 2**halvings:
            raise ConfigError(
                f"model.sample_size={self.model['sample_size']} cannot be halved {halvings} times, once between each "
                "two of model.block_out_channels"
            )
        if self.model["num_class_embeds"] < 2:
            raise ConfigError(
                "model.num_class_embeds must be one more than the classes, of which there is at least one"
            )
        if self.model["in_channels"] != self.model["out_channels"]:
            raise ConfigError("model.out_channels of a UNet2DModel must be model.in_channels, which are the latents'")
        if self.loss.alignment.weight:
            raise ConfigError("loss.alignment.weight is for transformers, not for a UNet2DModel")

    def _check_diffusion(self) -> None:
        self._refuse(FOR_TOKENS, "is for a CATTransformerModel")
        model, alignment = self.model, self.loss.alignment
        if not self.takes_texts and model.get("num_classes") == 0:
            raise ConfigError("model.num_classes=0 needs model.text_dim: a generator is told a class or a text")
        if self.takes_texts and self.data.warmup_latents:
            raise ConfigError("data.warmup_latents is for generators of classes, not for model.text_dim")
        if self.builds(LightningDiTTransformer2DModel):
            self._refuse(["loss.class_dropout_prob"], "is model.class_dropout_prob here")
        is_dit = self.builds(DiTTransformer2DModel)
        counts = {"sampling": self.sampling.num_inference_steps, "evaluation": self.evaluation.num_inference_steps}
        for section, count in counts.items():
            if self.loss.objective == "ddpm" and (count or 0) > 1000:
                raise ConfigError(f"{section}.num_inference_steps must be at most 1000 for loss.objective=ddpm")
        if self.loss.objective == "ddpm" and not (is_dit or self.builds(UNet2DModel)):
            raise ConfigError("loss.objective=ddpm needs model.name=DiTTransformer2DModel or UNet2DModel")
        if self.loss.objective == "ddpm" and is_dit and model.get("num_embeds_ada_norm", 1000) != 1000:
            raise ConfigError(
                "loss.objective=ddpm is sampled by DiTPipeline, whose null class is always 1000: "
                f"model.num_embeds_ada_norm must be 1000, got {model['num_embeds_ada_norm']}; fewer may be used"
            )
        if self.builds(UNet2DModel):
            self._check_unet()
        channels = self._in_channels
        allowed = [channels, 2 * channels] if self.loss.objective == "ddpm" else [channels]
        if is_dit and model.get("out_channels") is None:
            model["out_channels"] = channels  # as diffusers' DiT has it, but DiTPipeline reads the config
        if is_dit and model["out_channels"] not in allowed:
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
