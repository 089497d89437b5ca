"""`CATTransformerModel`: samples the tokens of an image one by one, or from coarse to fine, by text or class."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from favae.errors import NonFiniteError
from favae.models.cat_block import CATBlock, LayerCache
from favae.models.flow_head import DEFAULT_STEPS, FlowHead, VelocityMLP
from favae.models.hub import HubModelMixin
from favae.models.scales import make_stages
from favae.models.text_conditioning import mean_of_text, prepare_text
from favae.models.token_heads import CategoricalHead, StageHead, TorchGenerators, has_values_outside


@dataclass
class CATTransformerOutput(BaseOutput):
    """
    Attributes:
        loss: scalar float32, the mean over tokens.
        hidden_states: (B, N, D), one per position, computed from the tokens before it, or of the stages before.
        logits: (B, N, K), or (B, N, Q, K) of residual codes; None for continuous tokens.
    """

    loss: Tensor
    hidden_states: Tensor
    logits: Tensor | None = None


@dataclass
class CATCache:
    """What `CATTransformerModel.step` needs of the positions before: the text, and the keys and values of each block.

    Attributes:
        encoder_hidden_states: (B, L, D).
        text_mask: (B, 1, 1, 1 + L).
        layers: one per block.
        position: of the next step.
    """

    encoder_hidden_states: Tensor
    text_mask: Tensor
    layers: list[LayerCache]
    position: int = 0


class CATTransformerModel(HubModelMixin, ModelMixin, ConfigMixin):
    r"""
    The cross-attention autoregressive transformer: a decoder over the tokens of a square grid, row by row, in which
    every block attends to all token embeddings of a text. `forward` gives the loss, `generate` samples grids.

    Tokens from coarse to fine are sampled stage by stage: all tokens of a scale, or of a scale's bands, at once.

    Parameters:
        sample_size: height and width of the token grid.
        order: "raster", row by row, or "next_scale" or "next_band", for the tokens of a [`VQModelFA`] with this
            quantizer.
        scales: of that quantizer; None for "raster".
        num_layers, num_attention_heads, attention_head_dim, hidden_size: the width D need not be heads * head_dim.
        text_dim: channels of the text embeddings. A text may have any number of them, also 1 (a sentence vector) or 0.
            None for a model of classes.
        num_classes: of a model of classes; 0 for texts. A class stands in the place of a text of one embedding, which
            is learned.
        text_pooling: None attends to all token embeddings; "mean" attends to one vector per text, their mean (for
            MiniLM, the direction of its sentence embedding). This is the condition that the paper compares with.
        mlp_ratio: width of the feed-forward divided by D.
        dropout: of what each block adds.
        text_dropout_prob: share of texts, or classes, that are left out in training, for classifier-free guidance.
        head: "categorical" for indices of a codebook, "flow" for continuous normalized latents.
        codebook_size: of the categorical head.
        num_quantizers: residual codes per token, of the categorical head.
        latent_channels: of the flow head.
        low_latent_channels: of the flow head; if given, the first so many channels of a token are sampled first, and
            the others given them.
        head_width, head_layers: of the flow head's network.
        attention: "multi_head", or "shared_key_value" as published: one key head for all queries, whose keys are the
            values too, and a learned null key beside the tokens.
        relative_position: whether self-attention has a bias per head for the rows and columns between tokens. As
            published, except that the published index is shifted by one cell.

    Raises:
        ValueError: for an unknown word, or settings that do not fit together.

    Every cell has a learned row and a learned column embedding. Every cross-attention has a learned null key and value
    that is always attended to, so that an empty text leaves something. Unlike in the published model, the outputs of
    attention and the inside of the feed-forward are not normalized.

    Source: Lin et al., CVPR 2023 (arXiv 2305.02541), whose 24-layer model has 611M parameters.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # its hooks are those of `forward`, which `generate` does not call
    _repeated_blocks = ["CATBlock"]
    _skip_layerwise_casting_patterns = ["token_head", "relative_position", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: PositiveInt = 16,
        num_layers: PositiveInt = 24,
        num_attention_heads: PositiveInt = 16,
        attention_head_dim: PositiveInt = 64,
        hidden_size: PositiveInt = 1536,
        text_dim: PositiveInt | None = 768,
        text_pooling: Literal["mean"] | None = None,
        mlp_ratio: PositiveFloat = 4.0,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        text_dropout_prob: Annotated[float, Field(ge=0, le=1)] = 0.25,
        head: Literal["categorical", "flow"] = "categorical",
        codebook_size: PositiveInt = 1024,
        num_quantizers: PositiveInt = 1,
        latent_channels: PositiveInt | None = None,
        low_latent_channels: PositiveInt | None = None,
        head_width: PositiveInt = 1024,
        head_layers: PositiveInt = 3,
        attention: Literal["multi_head", "shared_key_value"] = "multi_head",
        relative_position: bool = False,
        order: Literal["raster", "next_scale", "next_band"] = "raster",
        scales: tuple[PositiveInt, ...] | None = None,
        num_classes: NonNegativeInt = 0,
    ):
        super().__init__()
        if (
            head not in ("categorical", "flow")
            or attention not in ("multi_head", "shared_key_value")
            or text_pooling not in ("mean", None)
            or order not in ("raster", "next_scale", "next_band")
        ):
            raise ValueError(f"unknown word among {head=}, {attention=}, {text_pooling=}, {order=}")
        if (text_dim is None) != (num_classes > 0):
            raise ValueError(f"need either text_dim, or num_classes and text_dim=None, got {text_dim=}, {num_classes=}")

        # 1. What goes in: tokens, the start token, positions
        self.token_head: CategoricalHead | FlowHead | StageHead
        if order != "raster":
            if (head, num_quantizers, relative_position) != ("categorical", 1, False):
                raise ValueError(f"{order=} needs head='categorical', num_quantizers=1 and relative_position=False")
            if scales is None or scales[-1] != sample_size:
                raise ValueError(f"{order=} needs scales up to {sample_size=}, got {scales}")
            if len(scales) < 2:
                raise ValueError(f"{order=} needs two scales or more, got {scales}; one is order='raster'")
            self.token_head = StageHead(codebook_size, hidden_size, make_stages(order, tuple(scales)))
        elif scales is not None:
            raise ValueError("scales are for order='next_scale' and order='next_band'")
        elif head == "categorical":
            if (latent_channels, low_latent_channels) != (None, None):
                raise ValueError("latent_channels and low_latent_channels are for head='flow'")
            self.token_head = CategoricalHead(codebook_size, hidden_size, num_quantizers)
        else:
            if latent_channels is None or num_quantizers != 1:
                raise ValueError("head='flow' needs latent_channels, and num_quantizers=1")
            self.token_head = FlowHead(
                latent_channels,
                hidden_size,
                width=head_width,
                num_layers=head_layers,
                low_channels=low_latent_channels,
            )
        self.start_token = nn.Parameter(torch.empty(hidden_size))
        self.visible: Tensor | None  # (N,), how many positions each position sees
        self.register_buffer("visible", None)
        if isinstance(self.token_head, StageHead):
            visible = [end for count, end in zip(self.steps, accumulate(self.steps)) for _ in range(count)]
            self.register_buffer("visible", torch.tensor(visible), persistent=False)
            self.position = nn.Parameter(torch.empty(len(visible), hidden_size))
        else:
            self.row_position = nn.Parameter(torch.empty(sample_size, 1, hidden_size))
            self.column_position = nn.Parameter(torch.empty(1, sample_size, hidden_size))
        self.norm_in = nn.LayerNorm(hidden_size)
        self.class_embedding = nn.Embedding(num_classes, hidden_size) if num_classes else None

        # 2. Blocks
        self.blocks = nn.ModuleList(
            CATBlock(
                hidden_size,
                num_heads=num_attention_heads,
                head_dim=attention_head_dim,
                text_dim=text_dim or hidden_size,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                shared_key_value=attention == "shared_key_value",
                relative_position_size=sample_size if relative_position else None,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size)
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 or "null" in name or name == "start_token":
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # As in GPT-2, the size of the stream does not grow with the depth.
        std = 0.02 / (3 * len(self.blocks)) ** 0.5
        for module in self.blocks.modules():
            if isinstance(module, CATBlock):
                module.initialize_outputs(std)
        for module in self.modules():
            if isinstance(module, VelocityMLP):
                module.initialize_weights()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image, N."""
        return sum(self.steps)

    @property
    def steps(self) -> list[int]:
        """How many tokens are sampled at once, one number per step of `generate`."""
        return self.token_head.counts if isinstance(self.token_head, StageHead) else [1] * self.config.sample_size**2

    def embed_classes(self, class_labels: Tensor) -> Tensor:
        """Classes (B,), int64 -> (B, 1, D), which stand in the place of text embeddings.

        Raises:
            ValueError: for a class that the model does not have.
        """
        classes = self.config.num_classes
        if self.class_embedding is None or has_values_outside(class_labels, classes):
            raise ValueError(f"the transformer has {classes} classes, got {class_labels.tolist()}")
        return self.class_embedding(class_labels).unsqueeze(1)

    def _condition(self, encoder_hidden_states: Tensor | None, class_labels: Tensor | None) -> Any:
        """The text embeddings, or those of the classes. Raises ValueError for the wrong, both or neither."""
        needed = "encoder_hidden_states" if self.class_embedding is None else "class_labels"
        given = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
        if [name for name, value in given.items() if value is not None] != [needed]:
            raise ValueError(f"this transformer needs {needed}, and nothing else as a condition")
        return encoder_hidden_states if class_labels is None else self.embed_classes(class_labels)

    def _prepare_text(self, embeddings: Tensor, mask: Tensor | None, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """The text as the blocks take it.

        Args:
            embeddings: (B, L, D). mask: (B, L), or None if there is text everywhere.
            dropout: share of texts that are left out.
        Returns:
            Embeddings with padding set to zero (or their mean, L = 1), and the mask (B, 1, 1, 1 + L) of keys in
            attention, that of the null key first.
        """
        embeddings, mask = prepare_text(embeddings, mask, self.start_token.dtype, dropout)
        if self.config.text_pooling == "mean":
            embeddings, mask = mean_of_text(embeddings, mask).unsqueeze(1), mask.any(1, keepdim=True)
        return embeddings, F.pad(mask, (1, 0), value=True)[:, None, None]

    def _inputs(self, context: Tensor | None, batch: int, first: int) -> Tensor:
        """What goes into the blocks at the positions from `first` on, (B, n, D): the start token at those of the first
        step, where `first` is 0, then the context (B, n', D), each with its place."""
        parts = [] if first else [self.start_token.expand(batch, self.steps[0], -1)]
        parts += [] if context is None else [context]
        if self.visible is None:  # a token has the place of its own cell, not of the one that is predicted from it
            places = F.pad((self.row_position + self.column_position).flatten(0, 1), (0, 0, 1, 0))
        else:
            places = self.position
        embeddings = torch.cat(parts, dim=1)
        return self.norm_in(embeddings + places[first : first + embeddings.shape[1]])

    def forward(
        self,
        tokens: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> CATTransformerOutput | tuple[Tensor, Tensor, Tensor | None]:
        """The loss of whole grids, in which each token is predicted from those before it, or of the stages before.

        Args:
            tokens: (B, h, w) or, with several codebooks, (B, h, w, Q), or from coarse to fine (B, N), int64; for the
                flow head (B, C, h, w), normalized.
            encoder_hidden_states: (B, L, text_dim), the text embeddings.
            encoder_attention_mask: (B, L), 0 or False where there is no text; None if there is text everywhere.
            class_labels: (B,), int64, of a model of classes, instead of the text.
        Raises:
            ValueError: for tokens of another shape than the model was built for, or outside the codebook; for a mask
                that does not fit the text; for a class that the model does not have.
        """
        # 1. Tokens and text
        self.token_head.check(tokens, self.config.sample_size)
        tokens = self.token_head.to_sequence(tokens)
        dropout = self.config.text_dropout_prob if self.training else 0.0
        condition = self._condition(encoder_hidden_states, class_labels)
        text, text_mask = self._prepare_text(condition, encoder_attention_mask, dropout)

        # 2. Every position sees the start token and the tokens before it
        hidden_states = self._inputs(self.token_head.context(tokens), len(tokens), 0)  # (B, N, D)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, text, text_mask, self.visible)
            else:
                hidden_states = block(hidden_states, text, text_mask, self.visible)
        hidden_states = self.norm_out(hidden_states)

        # 3. Loss
        loss, logits = self.token_head.loss(hidden_states, tokens)
        if not return_dict:
            return loss, hidden_states, logits
        return CATTransformerOutput(loss=loss, hidden_states=hidden_states, logits=logits)

    def start(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None) -> CATCache:
        """An empty cache for `step`. The text is as in `forward`; classes are embedded by `embed_classes`."""
        text, text_mask = self._prepare_text(encoder_hidden_states, encoder_attention_mask)
        slots = self.num_tokens + (self.config.attention == "shared_key_value")
        return CATCache(text, text_mask, [LayerCache(slots) for _ in self.blocks])

    @torch.no_grad()
    @apply_forward_hook
    def step(self, previous: Tensor | None, cache: CATCache) -> Tensor:
        """The hidden states (B, n, D) of the next positions, without gradients. Changes the cache.

        Args:
            previous: (B, n, D), what they see of the tokens of the step before, by `token_head.embed`; None for the
                first.
            cache: by `start`.
        Raises:
            ValueError: if `previous` is missing, or the grid is full.
        """
        first = cache.position
        if first == self.num_tokens or (previous is None) != (first == 0):
            raise ValueError(f"position {first} of {self.num_tokens} cannot be predicted from {previous}")
        hidden_states = self._inputs(previous, len(cache.encoder_hidden_states), first)
        cache.position += hidden_states.shape[1]
        cells = torch.arange(first, cache.position, device=hidden_states.device)
        for block, layer in zip(self.blocks, cache.layers):
            hidden_states = block(
                hidden_states, cache.encoder_hidden_states, cache.text_mask, self.visible, cells, layer
            )
        return self.norm_out(hidden_states)

    @torch.no_grad()
    @apply_forward_hook
    def generate(
        self,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_head_steps: int | None = None,
        generator: TorchGenerators = None,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Samples one grid per text, or per class.

        Args:
            encoder_hidden_states, encoder_attention_mask, class_labels: as in `forward`.
            guidance_scale: classifier-free guidance, null + scale (text - null), of the logits or of the flow head's
                velocities. 1 switches it off; anything else doubles the batch. From coarse to fine, it grows linearly
                from 1 at the first stage to this scale at the last, as VAR's, whose "cfg" is this number less 1.
            temperature: divides the logits (0 takes the likeliest token), or scales the flow head's noise.
            top_k, top_p: of the categorical head: only the k likeliest tokens can be sampled, or only the likeliest
                that together have this probability.
            num_head_steps: of the flow head: Euler steps per token; None takes 25.
            generator: one, or one per image; with one per image a sample does not depend on its batch.
            callback: called with its number after each step: a token, or a stage.
        Returns:
            Tokens in the shape that `forward` takes; float32 for the flow head.
        Raises:
            ValueError: for values out of range, arguments of the other head, a condition that the model does not take,
                or guidance of a model that was never trained without one.
            NonFiniteError: if hidden states are not finite. Indices alone would not show it: the first would be taken.
        """
        condition = self._condition(encoder_hidden_states, class_labels)
        batch, is_guided = len(condition), guidance_scale != 1
        if is_guided and self.config.text_dropout_prob == 0:
            raise ValueError("guidance needs a transformer trained with text_dropout_prob > 0; use guidance_scale=1")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images")
        options = self._sampling_options(temperature, top_k, top_p, num_head_steps)

        # 1. Guidance doubles the batch: the second half has no text
        if is_guided:
            mask = encoder_attention_mask
            mask = condition.new_ones(condition.shape[:2]) if mask is None else mask
            encoder_attention_mask = torch.cat([mask, torch.zeros_like(mask)])
            condition = torch.cat([condition, condition])
        cache = self.start(condition, encoder_attention_mask)

        # 2. One step after the other, in both halves the same
        tokens, finite, previous = [], [], None
        steps = self.steps
        for step in range(len(steps)):
            hidden = self.step(previous, cache)  # (B or 2B, n, D)
            finite.append(torch.isfinite(hidden).all())
            scale = guidance_scale
            if self.visible is not None:
                scale = 1 + (guidance_scale - 1) * step / (len(steps) - 1)
            seen = hidden if scale != 1 else hidden[:batch]
            sampled = self.token_head.sample(seen, guidance_scale=scale, generator=generator, **options)
            tokens.append(sampled)
            if step + 1 < len(steps):
                previous = self.token_head.embed(sampled)
                previous = torch.cat([previous, previous]) if is_guided else previous
            if callback is not None:
                callback(step)
        if not torch.stack(finite).all():  # not in the loop, because whoever looks waits for the accelerator
            raise NonFiniteError(
                f"hidden states of the transformer are not finite in {self.dtype}; run it in float32 or bfloat16, or "
                "check its weights"
            )
        return self.token_head.to_grid(torch.cat(tokens, dim=1), self.config.sample_size)

    def _sampling_options(
        self, temperature: float, top_k: int | None, top_p: float | None, num_head_steps: int | None
    ) -> dict[str, Any]:
        """The arguments of the head's `sample`."""
        steps = DEFAULT_STEPS if num_head_steps is None else num_head_steps
        if temperature < 0 or steps < 1:
            raise ValueError(f"need temperature >= 0 and num_head_steps >= 1, got {temperature} and {num_head_steps}")
        if not isinstance(self.token_head, FlowHead):
            unused: dict[str, Any] = {"num_head_steps": num_head_steps}
            options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        else:
            unused = {"top_k": top_k, "top_p": top_p}
            options = {"temperature": temperature, "num_steps": steps}
        if given := [name for name, value in unused.items() if value is not None]:
            raise ValueError(f"{' and '.join(given)} cannot be given for head='{self.config.head}'")
        return options
