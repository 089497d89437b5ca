"""`LightningDiTPipeline`: classes or texts to images, with any autoencoder, by a scheduler of flows or of noise."""

from collections.abc import Callable, Sequence
from inspect import signature

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from favae.autoencoders import spatial_compression_ratio
from favae.models import LightningDiTTransformer2DModel
from favae.models.class_conditional import num_classes, time_scale
from favae.models.token_heads import guide
from favae.pipelines.conditions import ConditionalPipeline, check_text_encoder
from favae.pipelines.decoding import check_autoencoder, decode_latents
from favae.pipelines.solvers import ROUNDING, check_scheduler


class LightningDiTPipeline(ConditionalPipeline):
    r"""
    Generation by flow matching, of classes, of texts or of both, as the transformer was trained; or by denoising
    diffusion.

    Parameters:
        transformer: predicts the velocity data - noise at time t (0 is noise, 1 is data): a
            [`LightningDiTTransformer2DModel`], or a [`DiTTransformer2DModel`] or [`UNet2DModel`] that was trained to do
            so and has as many output as input channels.
        vae: an autoencoder of single images, such as [`AutoencoderKL`]. See `decode_latents` for how its config scales
            latents back. With None only `output_type="latent"` is possible.
        scheduler: a [`FlowMatchEulerDiscreteScheduler`], whose `shift` is 1 / s for LightningDiT's timestep shift s, or
            another one of flows; see `flow_scheduler`. With `prediction_type="epsilon"` one of diffusion, such as
            [`DDIMScheduler`].
        text_encoder, tokenizer: of transformers, those that a transformer of texts was trained with. With None only
            `prompt_embeds` are possible.
        id2label: class index -> name, for `get_label_ids`.
        max_length: number of tokens to which prompts are cut, with a warning. None takes as many as the encoder can.
        prediction_type: what the transformer predicts, by the name that schedulers have for it: "flow_prediction", or
            "epsilon", the noise, of a transformer that is told diffusion's time steps.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: LightningDiTTransformer2DModel | DiTTransformer2DModel | UNet2DModel,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None,  # no default: see CATPipeline
        tokenizer: PreTrainedTokenizerBase | None,
        id2label: dict | None = None,
        max_length: int | None = None,
        prediction_type: str = "flow_prediction",
    ):
        super().__init__()
        channels = transformer.config.in_channels
        if (transformer.config.get("out_channels") or channels) != channels:
            raise ValueError(f"the transformer has {transformer.config.out_channels} output channels, not {channels}")
        if vae is not None:
            check_autoencoder(vae, channels)
        if text_encoder is not None:
            check_text_encoder(transformer, text_encoder)
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(id2label=id2label, max_length=max_length, prediction_type=prediction_type)
        self.vae_scale_factor = 8 if vae is None else spatial_compression_ratio(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def num_timesteps(self) -> int:
        """How many steps the last call made, or makes."""
        return self._num_timesteps

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalized latents (B, C, h, w) -> images (B, C, H, W) around [-1, 1]."""
        return decode_latents(self.vae, latents)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | None = None,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            class_labels: one class index per image; see `get_label_ids`. None for a transformer without classes.
            guidance_scale: classifier-free guidance, v = v_null + scale (v_class - v_null); 1 switches it off.
            guidance_interval: guidance acts while the time t (0 is noise, 1 is data) is in this closed interval.
            guidance_channels: only the first so many latent channels are guided, 3 for LightningDiT's published
                numbers; None guides all.
            num_inference_steps: steps of the scheduler. Each is one evaluation of the transformer (two with Heun's
                method), with guidance of a doubled batch.
            generator: one, or one per image; with one per image a sample does not depend on its batch.
            latents: (B, C, h, w), standard normal noise to start from; None samples it.
            output_type: "pil", "np" ((B, H, W, C) in [0, 1]), "pt" ((B, C, H, W) in [0, 1]) or "latent" (normalized).
            prompt: of a transformer of texts: one text, or one per image. An empty one samples without a text.
            num_images_per_prompt: number of consecutive images of each class or prompt.
            prompt_embeds, prompt_attention_mask: text embeddings (B, L, D) and mask (B, L) by `encode_prompt`, instead
                of `prompt`. Guidance leads away from no text; there is no negative prompt.
            callback_on_step_end: is called with the pipeline, the number of the step, its timestep and {"latents": ...}
                after each, and may return other latents, as in diffusers' pipelines. If it sets `_interrupt` of the
                pipeline to True, no more steps are made.
            callback_on_step_end_tensor_inputs: what it is given; there are latents alone.

        Returns:
            [`ImagePipelineOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: for a class index that the transformer does not have, classes or texts that it needs or does
                not take, guidance of a transformer that was never trained without them, an interval that does not rise,
                a number of channels that it does not have, or a scheduler of other predictions.
            NonFiniteError: if latents or images are not finite.
        """
        # 1. The condition, that of guidance, and noise
        transformer, config = self.transformer, self.transformer.config
        if self.vae is None and output_type != "latent":
            raise ValueError('a pipeline without an autoencoder needs output_type="latent"')
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: no {unknown}, only {self._callback_tensor_inputs}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
        if guidance_interval[0] > guidance_interval[1]:
            raise ValueError(f"guidance_interval must rise, got {tuple(guidance_interval)}")
        if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
            raise ValueError(f"guidance_channels must be in 1 ... {config.in_channels}, got {guidance_channels}")
        texts = {"prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}
        condition = self._classes(class_labels, guidance_scale, num_images_per_prompt)
        condition |= self._texts(prompt, guidance_scale, num_images_per_prompt=num_images_per_prompt, **texts)
        if not condition:
            raise ValueError("this transformer has neither classes nor texts; LightningDiTPipeline needs one of them")
        count = len(next(iter(condition.values()))[0])
        if any(len(value) != count for pair in condition.values() for value in pair):
            raise ValueError("class_labels and prompts must be of as many images")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images")
        device, scale = self._execution_device, time_scale(transformer)
        size = config.sample_size
        shape = (count, config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if len(latents) != count:
            raise ValueError(f"latents of {len(latents)} images for {count}")
        latents = latents.to(device, torch.float32)
        is_flow = self.config.prediction_type == "flow_prediction"

        # 2. Steps of the solver. Those of Euler are on the exact time grid of LightningDiT: set_timesteps(N) alone ends
        # above zero and shifts its end twice.
        if is_flow and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        check_scheduler(self.scheduler, self.config.prediction_type)
        options = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        self._interrupt, self._num_timesteps = False, len(self.scheduler.timesteps)
        if is_flow:
            self.scheduler.set_begin_index(0)  # of many steps with a large shift, the first two may have one timestep
        else:
            latents = latents * self.scheduler.init_noise_sigma
        begin, end = guidance_interval[0] - ROUNDING, guidance_interval[1] + ROUNDING
        for number, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                break
            if is_flow:
                time = 1 - self.scheduler.sigmas[number].to(device)  # 0 is noise; some round their time steps
                inputs, told = latents, scale * time
            else:
                time = 1 - timestep / len(self.scheduler)
                inputs, told = self.scheduler.scale_model_input(latents, timestep), timestep
            is_guided = guidance_scale != 1 and begin <= time <= end
            batch = torch.cat([inputs, inputs]) if is_guided else inputs
            given = {key: torch.cat(pair) if is_guided else pair[0] for key, pair in condition.items()}
            times = told.expand(len(batch)).float()
            output = transformer(batch.to(transformer.dtype), timestep=times, return_dict=False, **given)[0].float()
            if is_guided:
                output = self._guide(output, guidance_scale, guidance_channels)
            if is_flow:  # the velocity of the scheduler points from data to noise, ours from noise to data
                output = -output
            latents = self.scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
            if callback_on_step_end is not None:
                shown = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                latents = (callback_on_step_end(self, number, timestep, shown) or {}).get("latents", latents)

        # 3. Images
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _classes(
        self, class_labels: list[int] | None, guidance_scale: float, num_images_per_prompt: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The transformer's argument for classes, and its value without one; nothing if it has no classes."""
        labels = self._labels_of(class_labels, num_images_per_prompt)
        if labels is None:
            return {}
        self._check_guidance(guidance_scale, "class_dropout_prob")
        return {"class_labels": (labels, torch.full_like(labels, num_classes(self.transformer)))}

    def _texts(
        self,
        prompt: str | list[str] | None,
        guidance_scale: float,
        *,
        num_images_per_prompt: int,
        **texts: Tensor | None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The transformer's arguments for texts, and their values without a text; nothing if it has no texts."""
        if self.transformer.config.get("text_dim") is None:
            if prompt is not None or any(value is not None for value in texts.values()):
                raise ValueError("this transformer takes no prompt")
            return {}
        embeddings, mask = self._text_of(prompt, **texts, num_images_per_prompt=num_images_per_prompt)
        self._check_guidance(guidance_scale, "text_dropout_prob")
        return {
            "encoder_hidden_states": (embeddings, embeddings),
            "encoder_attention_mask": (mask, torch.zeros_like(mask)),
        }

    def _check_guidance(self, scale: float, key: str) -> None:
        if scale != 1 and self.transformer.config.get(key) == 0:
            raise ValueError(f"guidance needs a transformer trained with {key} > 0; use guidance_scale=1")

    @staticmethod
    def _guide(output: Tensor, scale: float, channels: int | None) -> Tensor:
        """(2B, C, h, w), the conditional half first -> (B, C, h, w); `channels` as `guidance_channels`."""
        guided = guide(output, scale)
        if channels is None:
            return guided
        conditional = output[: len(guided)]
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)
