"""What pipelines that take classes or texts have in common."""

from inspect import signature

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from transformers import PreTrainedModel

from favae.models.class_conditional import num_classes
from favae.models.token_heads import has_values_outside
from favae.pipelines.decoding import device_of
from favae.text_encoder import encode_texts, text_limit, warn_of_cut


class ConditionalPipeline(DiffusionPipeline):
    """A pipeline with `text_encoder` and `tokenizer` of transformers, either of them perhaps None, and, in its
    configuration, `max_length` and the names of classes, `id2label`."""

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "ConditionalPipeline":
        """A pipeline of this class with the parts and settings of another one, or those that are given.

        diffusers' own takes over parts of exactly the annotated classes alone, not of those derived from them.
        """
        names = signature(cls.__init__).parameters
        parts = {name: part for name, part in pipeline.components.items() if name in names}
        missing = dict.fromkeys(name for name in cls._optional_components if name in names)
        return super().from_pipe(pipeline, **{**missing, **parts, **kwargs})

    @property
    def labels(self) -> dict[str, int]:
        """Class indices by name; of classes with the same name, the last."""
        return {name: int(index) for index, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The class indices of one or more class names.

        Raises:
            ValueError: for a name that the pipeline does not know.
        """
        names = [label] if isinstance(label, str) else label
        for name in names:
            if name not in self.labels:
                raise ValueError(f"no class '{name}', there are {', '.join(self.labels)}")
        return [self.labels[name] for name in names]

    def _labels_of(self, class_labels: list[int] | None, num_images_per_prompt: int) -> Tensor | None:
        """Class indices (B,), one for each image; None for a transformer without classes.

        Raises:
            ValueError: if the transformer needs classes, or takes none, or does not have one of them.
        """
        count = num_classes(self.transformer)
        if (class_labels is None) != (count == 0):
            raise ValueError(f"this transformer {'takes no' if count == 0 else 'needs'} class_labels")
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if not len(labels) or labels.is_floating_point():
            raise ValueError(f"class labels are one or more whole numbers, got {class_labels}")
        if has_values_outside(labels, count):
            raise ValueError(f"class labels go from 0 to {count - 1}, got {labels.tolist()}")
        return labels.repeat_interleave(num_images_per_prompt)

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
        device = device_of(self.text_encoder, self._execution_device)
        embeddings, mask = encode_texts(self.text_encoder, self.tokenizer, prompts, limit, device)
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
    own = transformer.config.get("text_dim")
    if own != width:
        raise ValueError(f"the transformer has text_dim={own}, the text encoder needs {width}")
