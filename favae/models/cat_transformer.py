"""`CATTransformerModel`: draws the tokens of an image one by one, given the token states of a text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from favae.models.cat_block import CATBlock, LayerCache
from favae.models.hub import HubModelMixin
from favae.models.token_heads import CategoricalHead, FlowHead, Generators, VelocityMLP


@dataclass
class CATTransformerOutput(BaseOutput):
    """
    Attributes:
        loss: scalar float32, the mean over tokens.
        hidden_states: (B, N, D), one per position, from what comes before it.
        logits: (B, N, K), or (B, N, Q, K) of residual codes; None for continuous tokens.
    """

    loss: Tensor
    hidden_states: Tensor
    logits: Tensor | None = None


@dataclass
class CATCache:
    """What `CATTransformerModel.step` knows of a batch: its text, and each block's keys and values."""

    encoder_hidden_states: Tensor
    text_mask: Tensor
    layers: list[LayerCache]
    position: int = 0


class CATTransformerModel(HubModelMixin, ModelMixin, ConfigMixin):
    r"""
    The cross-attention autoregressive transformer: a decoder over the tokens of a square grid, row by row, every block
    of which attends to all token states of a text. `forward` gives the loss, `generate` draws grids.

    Parameters:
        sample_size: height and width of the token grid.
        num_layers, num_attention_heads, attention_head_dim, hidden_size: the width D need not be heads * head_dim.
        text_dim: of the text's token states. The text may have any length, also 1 (a sentence vector) and 0.
        text_pooling: None attends to all token states; "mean" to one vector per text, the mean of them (for MiniLM,
            the direction of its sentence embedding): the kind of condition that the paper compares with.
        mlp_ratio: of the feed-forward width.
        dropout: of what each block adds.
        text_dropout_prob: share of texts left out in training, for classifier-free guidance.
        head: "categorical" for indices of a codebook, "flow" for continuous normalised latents.
        codebook_size: of the categorical head. num_quantizers: residual codes per token, of the categorical head.
        latent_channels: of the flow head. low_latent_channels: if given, a token's first so many channels are drawn
            first and the others given them.
        head_width, head_layers: of the flow head's network.
        attention: "multi_head", or "shared_key_value": one key head for all queries, whose keys are the values too, and
            a learned null key beside the tokens; as published.
        position: "axial", a learned embedding per row and per column, or None.
        relative_position: whether self-attention has a bias per head for rows and columns between tokens; as published,
            but for an index that was shifted by one cell.

    Raises:
        ValueError: if settings do not fit together.

    Every cross-attention has a learned null key and value, always attended: what is left of an empty text. Unlike the
    published model, attention outputs and the inside of the feed-forward are not normalised.

    Source: Lin et al., CVPR 2023 (arXiv 2305.02541), whose 24-layer model has 611M parameters.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # `generate` goes past the hook of `forward`, which brings the token head
    _no_split_modules = ["CATBlock"]
    _repeated_blocks = ["CATBlock"]
    _skip_layerwise_casting_patterns = ["token_head", "relative_position", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        hidden_size: int = 1536,
        text_dim: int = 768,
        text_pooling: str | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        text_dropout_prob: float = 0.25,
        head: str = "categorical",
        codebook_size: int = 1024,
        num_quantizers: int = 1,
        latent_channels: int | None = None,
        low_latent_channels: int | None = None,
        head_width: int = 1024,
        head_layers: int = 3,
        attention: str = "multi_head",
        position: str | None = "axial",
        relative_position: bool = False,
    ):
        super().__init__()
        _one_of("head", head, ("categorical", "flow"))
        _one_of("attention", attention, ("multi_head", "shared_key_value"))
        _one_of("position", position, ("axial", None))
        _one_of("text_pooling", text_pooling, ("mean", None))
        if head == "categorical" and (latent_channels, low_latent_channels) != (None, None):
            raise ValueError("latent_channels and low_latent_channels are for head='flow'")
        if head == "flow" and (latent_channels is None or num_quantizers != 1):
            raise ValueError("head='flow' needs latent_channels, and num_quantizers=1")
        if head == "categorical":
            self.token_head = CategoricalHead(codebook_size, hidden_size, num_quantizers)
        else:
            self.token_head = FlowHead(latent_channels, hidden_size, head_width, head_layers, low_latent_channels)
        self.start_token = nn.Parameter(torch.empty(hidden_size))
        self.row_position = self.column_position = None
        if position == "axial":
            self.row_position = nn.Parameter(torch.empty(sample_size, 1, hidden_size))
            self.column_position = nn.Parameter(torch.empty(1, sample_size, hidden_size))
        self.norm_in = nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(
            CATBlock(
                hidden_size,
                num_attention_heads,
                attention_head_dim,
                text_dim,
                mlp_ratio,
                dropout,
                attention == "shared_key_value",
                sample_size if relative_position else None,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 or "null" in name or name == "start_token":
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks:  # as GPT-2: the stream's size does not grow with the depth
            for layer in (block.attn.to_out, block.cross_attn.to_out, block.ff[2]):
                nn.init.normal_(layer.weight, std=0.02 / (3 * len(self.blocks)) ** 0.5)
        for module in self.modules():
            if isinstance(module, VelocityMLP):
                module.initialise()

    @property
    def num_tokens(self) -> int:
        """Tokens of a grid, N."""
        return self.config.sample_size**2

    def _text(self, states: Tensor, mask: Tensor | None, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """States, zero where nobody may look, or one of them all, and the mask (B, 1, 1, 1 + L), the null in front."""
        if states.ndim != 3 or states.shape[2] != self.config.text_dim:
            raise ValueError(f"built for text states (B, L, {self.config.text_dim}), got {tuple(states.shape)}")
        if mask is None:
            mask = torch.ones(states.shape[:2], device=states.device)
        elif mask.shape != states.shape[:2]:
            raise ValueError(f"the text mask must have shape {tuple(states.shape[:2])}, got {tuple(mask.shape)}")
        mask = mask.bool()
        if dropout > 0:
            mask = mask & (torch.rand(len(mask), 1, device=mask.device) >= dropout)
        states = states.to(self.start_token.dtype).masked_fill(~mask.unsqueeze(-1), 0)  # an infinite one would spread
        if self.config.text_pooling == "mean":
            states = states.sum(1, keepdim=True) / mask.sum(1).clamp_min(1)[:, None, None].to(states.dtype)
            mask = mask.any(1, keepdim=True)
        return states, F.pad(mask, (1, 0), value=True)[:, None, None]

    def _place(self, embeddings: Tensor, first: int) -> Tensor:
        """Adds their places to embeddings (B, n, D) of the tokens from `first` on."""
        if self.row_position is None:
            return embeddings
        places = (self.row_position + self.column_position).flatten(0, 1)  # (N, D)
        return embeddings + places[first : first + embeddings.shape[1]]

    def forward(
        self,
        tokens: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> CATTransformerOutput | tuple[Tensor, Tensor, Tensor | None]:
        """The loss of whole grids, each token predicted from those before it.

        Args:
            tokens: (B, h, w) or, of several codebooks, (B, h, w, Q), int64; for the flow head (B, C, h, w), normalised.
            encoder_hidden_states: (B, L, text_dim), the text's token states.
            encoder_attention_mask: (B, L), 0 or False where there is no text; None if there is text everywhere.
        Raises:
            ValueError: for tokens or texts of other shapes than the model was built for, or outside the codebook.
        """
        self.token_head.check(tokens, self.config.sample_size)
        if len(encoder_hidden_states) != len(tokens):
            raise ValueError(f"{len(encoder_hidden_states)} texts for {len(tokens)} grids")
        tokens = self.token_head.sequence(tokens)
        dropout = self.config.text_dropout_prob if self.training else 0.0
        text, text_mask = self._text(encoder_hidden_states, encoder_attention_mask, dropout)
        embeddings = self._place(self.token_head.embed(tokens[:, :-1]), 0)
        start = self.start_token.to(embeddings.dtype).expand(len(tokens), 1, -1)
        hidden_states = self.norm_in(torch.cat([start, embeddings], dim=1))  # (B, N, D)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, text, text_mask)
            else:
                hidden_states = block(hidden_states, text, text_mask)
        hidden_states = self.norm_out(hidden_states)
        loss, logits = self.token_head.loss(hidden_states, tokens)
        if not return_dict:
            return loss, hidden_states, logits
        return CATTransformerOutput(loss=loss, hidden_states=hidden_states, logits=logits)

    def start(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None) -> CATCache:
        """An empty cache for `step`; the text as in `forward`, which is projected once."""
        text, text_mask = self._text(encoder_hidden_states, encoder_attention_mask)
        slots = self.num_tokens + (self.config.attention == "shared_key_value")
        return CATCache(text, text_mask, [LayerCache(slots) for _ in self.blocks])

    @torch.no_grad()
    @apply_forward_hook
    def step(self, previous: Tensor | None, cache: CATCache) -> Tensor:
        """The hidden state (B, D) of the next position; changes the cache. Without gradients.

        Args:
            previous: (B, D), the embedding of the token before it by `token_head.embed`; None for the first position.
        Raises:
            ValueError: if it is missing, or the grid is full.
        """
        if cache.position == self.num_tokens or (previous is None) != (cache.position == 0):
            raise ValueError(f"position {cache.position} of {self.num_tokens} does not go on from {type(previous)}")
        if previous is None:
            hidden_states = self.start_token.expand(len(cache.encoder_hidden_states), 1, -1)
        else:
            hidden_states = self._place(previous.unsqueeze(1), cache.position - 1)
        hidden_states = self.norm_in(hidden_states)
        cell = torch.tensor([cache.position], device=hidden_states.device)
        for block, layer in zip(self.blocks, cache.layers):
            hidden_states = block(hidden_states, cache.encoder_hidden_states, cache.text_mask, cell, layer)
        cache.position += 1
        return self.norm_out(hidden_states).squeeze(1)

    @torch.no_grad()
    @apply_forward_hook
    def generate(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_head_steps: int | None = None,
        generator: Generators = None,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draws one grid per text.

        Args:
            encoder_hidden_states, encoder_attention_mask: as in `forward`.
            guidance_scale: classifier-free guidance, null + scale (text - null) of the logits, or of the flow head's
                velocities; 1 switches it off, otherwise the batch is doubled.
            temperature: divides the logits (0 takes the likeliest), or scales the flow head's noise.
            top_k, top_p: only the k likeliest tokens, only the likeliest with this probability; categorical head.
            num_head_steps: Euler steps per token of the flow head; None takes 25.
            generator: one, or one per image; with one per image a sample does not depend on its batch.
            callback: called with its position after each token.
        Returns:
            Tokens in the shape that `forward` takes; float32 for the flow head.
        Raises:
            ValueError: for settings out of range, or guidance of a model that was never trained without text.
        """
        self._check_sampling(guidance_scale, temperature, top_k, top_p, num_head_steps)
        batch = len(encoder_hidden_states)
        if isinstance(generator, (list, tuple)) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images")
        guided = guidance_scale != 1
        if guided:
            mask = encoder_attention_mask
            mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2]) if mask is None else mask
            encoder_attention_mask = torch.cat([mask, torch.zeros_like(mask)])
            encoder_hidden_states = torch.cat([encoder_hidden_states, encoder_hidden_states])
        cache = self.start(encoder_hidden_states, encoder_attention_mask)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "num_steps": num_head_steps}
        tokens, previous = [], None
        for position in range(self.num_tokens):
            hidden = self.step(previous, cache)  # (B or 2B, D)
            token = self.token_head.sample(hidden, guidance_scale=guidance_scale, generator=generator, **options)
            tokens.append(token)
            previous = self.token_head.embed(token.unsqueeze(1)).squeeze(1)
            previous = torch.cat([previous, previous]) if guided else previous
            if callback is not None:
                callback(position)
        return self.token_head.grid(torch.stack(tokens, dim=1), self.config.sample_size)

    def _check_sampling(self, guidance_scale, temperature, top_k, top_p, num_head_steps) -> None:
        if guidance_scale != 1 and self.config.text_dropout_prob == 0:
            raise ValueError("guidance needs a transformer trained with text_dropout_prob > 0; use guidance_scale=1")
        if temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if num_head_steps is not None and num_head_steps < 1:
            raise ValueError(f"num_head_steps must be at least 1, got {num_head_steps}")


def _one_of(name: str, value: str | None, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
