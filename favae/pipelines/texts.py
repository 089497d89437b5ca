"""What pipelines that take texts have in common."""

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from transformers import PreTrainedModel

from favae.text_encoder import encode_texts, text_limit, warn_of_cut


class TextPipeline(DiffusionPipeline):
    """A pipeline with `text_encoder` and `tokenizer` of transformers, either of them perhaps None, and `max_length`."""

    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """The text embeddings (B, L, D) and mask (B, L) of prompts. An empty prompt has an empty mask: no text at all.

        Raises:
            ValueError: for a prompt that is not a string, or without a text encoder.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(x, str) for x in prompts):
            raise ValueError(f"prompt must be a string or a list of strings, got {prompt!r}")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("a pipeline without a text encoder needs prompt_embeds and prompt_attention_mask")
        prompts = list(prompts)
        limit = self.config.max_length or text_limit(self.text_encoder, self.tokenizer)
        embeddings, mask = encode_texts(self.text_encoder, self.tokenizer, prompts, limit)
        warn_of_cut(self.tokenizer, prompts, mask, limit)
        empty = torch.tensor([not text.strip() for text in prompts], device=mask.device)
        return embeddings, mask & ~empty.unsqueeze(1)

    def _text_of(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        num_images_per_prompt: int,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) in the transformer's dtype, and mask (B, L), one for each image.

        Raises:
            ValueError: for both or neither of `prompt` and `prompt_embeds`, or embeddings without a mask.
        """
        if prompt is not None and prompt_embeds is None and prompt_attention_mask is None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        elif prompt is not None or prompt_embeds is None or prompt_attention_mask is None:
            raise ValueError("give either prompt, or both prompt_embeds and prompt_attention_mask")
        device, dtype = self._execution_device, self.transformer.dtype
        embeddings = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        return embeddings, prompt_attention_mask.to(device).repeat_interleave(num_images_per_prompt, dim=0)


def check_text_encoder(transformer: ModelMixin, text_encoder: PreTrainedModel) -> None:
    """Raises ValueError for a transformer of other embeddings than those of the text encoder."""
    width = text_encoder.config.hidden_size
    if transformer.config.text_dim != width:
        raise ValueError(f"the transformer has text_dim={transformer.config.text_dim}, the text encoder needs {width}")
