"""`CATPipeline`: texts or classes to images, token by token, with a codebook or with continuous latents."""

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from favae.autoencoders import spatial_compression_ratio
from favae.models import CATTransformerModel, VQModelFA
from favae.pipelines.conditions import ConditionalPipeline, check_text_encoder
from favae.pipelines.decoding import check_autoencoder, decode_finite, decode_latents


class CATPipeline(ConditionalPipeline):
    r"""
    Autoregressive generation of texts or of classes, token by token or from coarse to fine.

    Parameters:
        transformer: a [`CATTransformerModel`].
        vae: the autoencoder that the tokens belong to: a [`VQModelFA`], or an [`AutoencoderKL`], see `decode_latents`
            for how its config scales latents back. With None only `output_type="latent"` is possible.
        text_encoder, tokenizer: of transformers, those that the transformer was trained with. With None only
            `prompt_embeds` are possible.
        max_length: number of tokens to which prompts are cut, with a warning. None takes as many as the encoder can.
        id2label: class index -> name, for `get_label_ids`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: CATTransformerModel,
        vae: VQModelFA | AutoencoderKL | None,
        # With a default, DiffusionPipeline.from_pretrained(..., text_encoder=None) would read the saved one.
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        if vae is not None:
            _check_vae(transformer, vae)
        if text_encoder is not None:
            check_text_encoder(transformer, text_encoder)
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(max_length=max_length, id2label=id2label)
        self.vae_scale_factor = 8 if vae is None else spatial_compression_ratio(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None):
        """Raises ValueError: `generate` uses parts of the transformer without the hooks that bring their weights."""
        raise ValueError("CATPipeline offloads whole models: enable_model_cpu_offload()")

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens of the transformer -> images (B, C, H, W) around [-1, 1]."""
        return (decode_latents if tokens.is_floating_point() else decode_finite)(self.vae, tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_head_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: list[int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            prompt: one text, or one per image. An empty one samples without a condition.
            num_images_per_prompt: number of consecutive images of each prompt, or class.
            guidance_scale: classifier-free guidance, null + scale (condition - null), of logits or velocities; 1
                switches it off.
            temperature: 1 samples from the learned distribution, less is safer, 0 takes the likeliest token.
            top_k, top_p: for codes: only the k likeliest tokens can be sampled, or only the likeliest that together
                have this probability.
            num_head_steps: for continuous latents: Euler steps per token; None takes 25.
            generator: one, or one per image; with one per image a sample does not depend on its batch.
            prompt_embeds, prompt_attention_mask: text embeddings (B, L, D) and mask (B, L) by `encode_prompt`, instead
                of `prompt`. Guidance leads away from no text; there is no negative prompt.
            output_type: "pil", "np" ((B, H, W, C) in [0, 1]), "pt" ((B, C, H, W) in [0, 1]) or "latent" (the tokens:
                int64 (B, h, w), (B, h, w, Q) or (B, N), or normalized latents (B, C, h, w)).
            class_labels: of a transformer of classes: one class index per image; see `get_label_ids`.

        Returns:
            [`ImagePipelineOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: for both or neither of `prompt` and `prompt_embeds`, embeddings without a mask of their shape,
                classes or texts that the transformer needs or does not take, a wrong number of generators, or values
                that the transformer refuses.
            NonFiniteError: if latents or images are not finite.
        """
        # 1. The condition
        if self.vae is None and output_type != "latent":
            raise ValueError('a pipeline without an autoencoder needs output_type="latent"')
        condition = {"class_labels": self._labels_of(class_labels, num_images_per_prompt)}
        if class_labels is None:
            texts = self._text_of(prompt, prompt_embeds, prompt_attention_mask, num_images_per_prompt)
            condition = dict(zip(("encoder_hidden_states", "encoder_attention_mask"), texts))
        elif not (prompt is None and prompt_embeds is None and prompt_attention_mask is None):
            raise ValueError("this transformer takes no prompt")

        # 2. Tokens, one after the other
        with self.progress_bar(total=len(self.transformer.steps)) as bar:
            tokens = self.transformer.generate(
                **condition,
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_head_steps=num_head_steps,
                generator=generator,
                callback=lambda step: bar.update(),
            )

        # 3. Images
        if output_type == "latent":
            images = tokens
        else:
            images = self.image_processor.postprocess(self.decode_tokens(tokens), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_vae(transformer: CATTransformerModel, vae: VQModelFA | AutoencoderKL) -> None:
    """Raises ValueError for a transformer of other tokens than those of the autoencoder."""
    if isinstance(vae, VQModelFA):
        kind = vae.config.quantizer
        codes = vae.config.num_quantizers if kind == "residual" else 1
        needed = {"head": "categorical", "codebook_size": vae.num_tokens, "num_quantizers": codes, "order": "raster"}
        if kind in ("next_scale", "next_band"):
            needed |= {"order": kind, "scales": list(vae.config.scales)}
    else:
        needed = {"head": "flow"}
    for name, value in needed.items():
        own = transformer.config[name]
        if (list(own) if isinstance(own, tuple) else own) != value:
            raise ValueError(f"the transformer has {name}={transformer.config[name]}, the autoencoder needs {value}")
    if needed["head"] == "flow":
        check_autoencoder(vae, transformer.config.latent_channels)
