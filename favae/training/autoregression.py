"""What an autoregressive generator learns: the tokens of an image one by one, given a text or a class."""

from typing import Any

from torch import Tensor, nn

from favae.data.latents import MomentsDataset, TokenDataset
from favae.errors import ConfigError, hint
from favae.models.cat_transformer import CATTransformerModel
from favae.text_encoder import TextEncoder


class AutoregressionModule(nn.Module):
    """CAT with the loss of its training. This is what DistributedDataParallel wraps.

    Args:
        transformer: its token head computes the loss.
    """

    def __init__(self, transformer: CATTransformerModel):
        super().__init__()
        self.transformer = transformer
        self.loss_name = "velocity" if transformer.config.head == "flow" else "cross_entropy"

    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name."""
        return {"transformer": self.transformer}

    def forward(self, latents: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            latents: normalized latents (B, C, h, w), or tokens (B, h, w[, Q]) or (B, N), int64.
            batch: "text_embeddings" (B, L, D) and "text_mask" (B, L), or "label" (B,), int64.
        Returns:
            The loss, and the same by name, detached.
        """
        if self.transformer.config.num_classes:
            condition = {"class_labels": batch["label"]}
        else:
            condition = {"encoder_hidden_states": batch["text_embeddings"]}
            condition["encoder_attention_mask"] = batch["text_mask"]
        loss, *_ = self.transformer(latents, **condition, return_dict=False)
        return loss, {self.loss_name: loss.detach()}


def open_text_encoder(dataset: MomentsDataset | TokenDataset, text_encoder: str | None = None) -> dict[str, Any]:
    """The components of a pipeline that read texts: `text_encoder`, `tokenizer` and `max_length`.

    Args:
        dataset: with text embeddings, which come from this encoder.
        text_encoder: where the encoder is; None looks where it was when the embeddings were written.
    Raises:
        ConfigError: if that is another encoder.
        MissingWeights: if it cannot be opened.
    """
    embeddings = dataset.text_embeddings
    assert embeddings is not None, "the data set was opened without text embeddings"
    name = text_encoder or embeddings.encoder
    try:
        with hint("data.text_encoder takes a local folder"):
            encoder = TextEncoder(name, embeddings.max_length)
    except ValueError as error:
        raise ConfigError(f"data.text_encoder: {error}; the embeddings of the captions have that length") from error
    if encoder.hash != embeddings.hash:
        raise ConfigError(
            f"data.text_encoder: {name} has other weights than the encoder that made the text embeddings; give that one"
        )
    return {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer, "max_length": encoder.max_length}


def check_tokens(transformer: CATTransformerModel, dataset: MomentsDataset | TokenDataset) -> None:
    """Raises ConfigError if the transformer was built for other tokens than the cache holds."""
    built = transformer.config
    wanted: dict[str, object]
    size = (built.sample_size, built.sample_size)
    if isinstance(dataset, MomentsDataset):
        wanted = {"model.head": "flow", "model.latent_channels, model.sample_size": dataset.latent_shape}
        found = {"model.head": built.head, "model.latent_channels, model.sample_size": (built.latent_channels, *size)}
    else:
        shape, codes = "model.sample_size, model.num_quantizers", (built.num_quantizers,)
        tokens: tuple[int, ...] = size + codes if built.num_quantizers > 1 else size
        if built.order != "raster":
            shape, tokens = "model.scales with as many tokens as", (transformer.num_tokens,)
        wanted = {
            "model.head": "categorical",
            shape: dataset.latent_shape,
            "model.codebook_size": dataset.codebook_size,
        }
        found = {"model.head": built.head, shape: tokens, "model.codebook_size": built.codebook_size}
    for key, value in wanted.items():
        if found[key] != value:
            raise ConfigError(f"{dataset.folder} needs a generator with {key} = {value}, this one has {found[key]}")
