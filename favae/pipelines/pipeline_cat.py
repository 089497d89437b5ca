"""`CATPipeline`: texts to images, token by token, with a codebook or with continuous latents."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from favae.models import CATTransformerModel, VQModelFA
from favae.pipelines.decoding import decode_latents
from favae.text_encoder import encode_texts, text_limit, warn_of_cut


class CATPipeline(DiffusionPipeline):
    r"""
    Autoregressive text-to-image generation.

    Parameters:
        transformer: a [`CATTransformerModel`].
        vae: what its tokens belong to: a [`VQModelFA`], or an [`AutoencoderKL`] whose `latents_mean` and `latents_std`
            scale its latents back. None for `output_type="latent"` alone.
        text_encoder, tokenizer: of transformers; the encoder that the transformer was trained with. None for
            `prompt_embeds` alone.
        max_length: tokens of a prompt, at most; longer ones are cut, with a warning. None takes what the encoder takes.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: CATTransformerModel,
        vae: VQModelFA | AutoencoderKL | None,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None = None,
    ):
        super().__init__()
        if vae is not None:
            _check_vae(transformer, vae)
        if text_encoder is not None:
            _check_text_encoder(transformer, text_encoder)
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(max_length=max_length)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def enable_sequential_cpu_offload(self, *arguments, **options):
        """Raises ValueError: parts of the transformer are used past the hooks that would bring their weights."""
        raise ValueError("CATPipeline offloads whole models: enable_model_cpu_offload()")

    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """Token states (B, L, D) and their mask (B, L); an empty prompt has an empty mask: no text at all.

        Raises:
            ValueError: for a prompt that is no string, or without a text encoder.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(x, str) for x in prompts):
            raise ValueError(f"prompt is a string or a list of strings, got {prompt!r}")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("a pipeline without a text encoder needs prompt_embeds and prompt_attention_mask")
        prompts = list(prompts)
        limit = self.config.max_length or text_limit(self.text_encoder, self.tokenizer)
        states, mask = encode_texts(self.text_encoder, self.tokenizer, prompts, limit)
        warn_of_cut(self.tokenizer, prompts, mask, limit)
        empty = torch.tensor([not text.strip() for text in prompts], device=mask.device)
        return states, mask & ~empty.unsqueeze(1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """What the transformer draws -> images (B, 3, H, W) around [-1, 1]."""
        if isinstance(self.vae, VQModelFA):
            return self.vae.decode(tokens).sample
        return decode_latents(self.vae, tokens)

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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            prompt: one text, or one per image; an empty one draws without a condition.
            num_images_per_prompt: consecutive images of each prompt.
            guidance_scale: classifier-free guidance of logits or velocities, null + scale (given - null); 1 is without.
            temperature: 1 draws from the distribution learnt, less is safer, 0 the likeliest.
            top_k, top_p: of a codebook: only the k likeliest tokens, or those that together have this probability.
            num_head_steps: Euler steps for each token of continuous latents.
            generator: one, or one per image; with one per image a sample does not depend on its batch.
            prompt_embeds, prompt_attention_mask: what `encode_prompt` gives, token states (B, L, D) and mask (B, L), in
                place of `prompt`. Guidance is away from no text; there is no negative prompt.
            output_type: "pil", "np" ((B, H, W, 3) in [0, 1]), "pt" ((B, 3, H, W) in [0, 1]) or "latent" (the tokens:
                int64 (B, h, w) or (B, h, w, Q), or normalised latents (B, C, h, w)).

        Returns:
            [`ImagePipelineOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: without or with both of `prompt` and `prompt_embeds`, for embeddings without a mask of their
                shape, for as many generators as there are no images, or settings that the transformer refuses.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if (prompt_embeds is None) != (prompt_attention_mask is None):
            raise ValueError("prompt_embeds and prompt_attention_mask belong together")
        if prompt_embeds is not None and prompt_attention_mask.shape != prompt_embeds.shape[:2]:
            shapes = tuple(prompt_attention_mask.shape), tuple(prompt_embeds.shape)
            raise ValueError(
                f"prompt_attention_mask of shape {shapes[0]} does not fit prompt_embeds of shape {shapes[1]}"
            )
        if self.vae is None and output_type != "latent":
            raise ValueError('a pipeline without an autoencoder needs output_type="latent"')
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        states = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        mask = prompt_attention_mask.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        with self.progress_bar(total=self.transformer.num_tokens) as bar:
            tokens = self.transformer.generate(
                states,
                mask,
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_head_steps=num_head_steps,
                generator=generator,
                callback=lambda position: bar.update(),
            )
        if output_type == "latent":
            images = tokens
        else:
            images = self.image_processor.postprocess(self.decode_tokens(tokens), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_vae(transformer: CATTransformerModel, vae: VQModelFA | AutoencoderKL) -> None:
    """Raises ValueError for a transformer of other tokens than the autoencoder's."""
    config = transformer.config
    if (config.head == "categorical") != isinstance(vae, VQModelFA):
        raise ValueError(f"a transformer with head='{config.head}' does not draw the tokens of a {type(vae).__name__}")
    if config.head == "flow":
        name, wanted, found = "latent channels", config.latent_channels, vae.config.latent_channels
    else:
        name, wanted, found = "entries in the codebook", config.codebook_size, vae.num_tokens
    residual = isinstance(vae, VQModelFA) and vae.config.quantizer == "residual"
    codes = vae.config.num_quantizers if residual else 1
    if config.num_quantizers != codes:
        raise ValueError(f"the transformer draws {config.num_quantizers} codes per token, the autoencoder has {codes}")
    if wanted != found:
        raise ValueError(f"the transformer was built for {wanted} {name}, the autoencoder has {found}")


def _check_text_encoder(transformer: CATTransformerModel, text_encoder: PreTrainedModel) -> None:
    """Raises ValueError for a transformer of other texts than the encoder's."""
    built, width = transformer.config.text_dim, text_encoder.config.hidden_size
    if built != width:
        raise ValueError(f"the transformer was built for states of {built} channels, the text encoder gives {width}")
