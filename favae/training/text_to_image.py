"""What is particular to training a text-to-image generator: text embeddings, the loss, the pipeline, sample grids."""

from pathlib import Path

from diffusers import ModelMixin
from torch import Tensor, nn

from favae.data.captions import read_captions
from favae.data.latents import MomentsDataset, TokenDataset
from favae.data.text_embeddings import FOLDER, TextEmbeddings
from favae.errors import ConfigError, hint
from favae.models import CATTransformerModel
from favae.pipelines import CATPipeline
from favae.text_encoder import TextEncoder
from favae.training.config import GeneratorConfig


class TextToImage:
    """CAT on a cache of tokens or latents with captions.

    Args:
        config: of the run.
        tokenizer: that wrote the cache; its config gets the statistics that its latents were normalised with.
        dataset: with text embeddings.
        transformer: as built.
    Raises:
        ConfigError: if the transformer was built for other tokens or texts.
        MissingWeights: if the text encoder of these embeddings cannot be opened.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        tokenizer: ModelMixin,
        dataset: MomentsDataset | TokenDataset,
        transformer: CATTransformerModel,
    ):
        self.config, self.dataset = config, dataset
        check_shapes(config, transformer, dataset)
        name = config.data.text_encoder or dataset.text_embeddings.encoder
        try:
            with hint("data.text_encoder takes a local folder"):
                encoder = TextEncoder(name, dataset.text_embeddings.max_length)
        except ValueError as error:
            raise ConfigError(f"data.text_encoder: {error}; the text embeddings have that length") from error
        if encoder.hash != dataset.text_embeddings.hash:
            raise ConfigError(
                f"data.text_encoder: {name} has other weights than the encoder of the text embeddings; give that one"
            )
        if isinstance(dataset, MomentsDataset):
            keys = ("latents_mean", "latents_std")
            statistics = {key: dataset.manifest[key] for key in keys}
            tokenizer.register_to_config(**statistics, scaling_factor=1.0, shift_factor=0.0)
        self.pipeline = CATPipeline(transformer, tokenizer, encoder.model, encoder.tokenizer, encoder.max_length)
        self.prompts = config.sampling.prompts or first_captions(dataset, config.sampling.num_images)

    def loss(self, model: nn.Module, batch: dict, features: None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that the dataset gave, and its name for the log."""
        codes = isinstance(self.dataset, TokenDataset)
        tokens = batch["tokens"] if codes else self.dataset.sample(batch)
        loss, *_ = model(tokens, batch["text_embeddings"], batch["text_mask"], return_dict=False)
        return loss, {"cross_entropy" if codes else "velocity": loss.detach()}

    def samples(self) -> tuple[dict, int]:
        """What the pipeline is called with for the grid of samples, and how many images make a row."""
        sampling = self.config.sampling
        prompts = [self.prompts[i % len(self.prompts)] for i in range(sampling.num_images)]
        options = {"prompt": prompts, "temperature": sampling.temperature}
        if isinstance(self.dataset, TokenDataset):
            return {**options, "top_k": sampling.top_k, "top_p": sampling.top_p}, 8
        return {**options, "num_head_steps": sampling.num_inference_steps}, 8


def open_text_embeddings(config: GeneratorConfig) -> TextEmbeddings:
    """The text embeddings of the captions, beside the latents or elsewhere."""
    return TextEmbeddings(config.data.text_embeddings or Path(config.data.latents) / FOLDER)


def first_captions(dataset: MomentsDataset | TokenDataset, count: int) -> list[str]:
    """The first caption of each of the first images that have one."""
    found: list[str] = []
    for number, size in enumerate(dataset.manifest["counts"]):
        found += [captions[0] for captions in read_captions(dataset.folder, number, size) if captions]
        if len(found) >= count:
            break
    return found[:count]


def check_shapes(
    config: GeneratorConfig, transformer: CATTransformerModel, dataset: MomentsDataset | TokenDataset
) -> None:
    """Raises ConfigError if the transformer was built for other tokens than the cache holds, or other texts."""
    built, where = transformer.config, config.data.latents
    stores = dataset.manifest["stores"]
    if (built.head == "categorical") != isinstance(dataset, TokenDataset):
        raise ConfigError(f"{where} holds {stores}; model.head={built.head} is for the other kind of cache")
    size = (built.sample_size, built.sample_size)
    if isinstance(dataset, MomentsDataset):
        names, expected = "model.latent_channels, model.sample_size", (built.latent_channels, *size)
    else:
        more = (built.num_quantizers,) if built.num_quantizers > 1 else ()
        names, expected = "model.sample_size, model.num_quantizers", (*size, *more)
    if dataset.latent_shape != expected:
        raise ConfigError(
            f"{where} holds {stores} of shape {dataset.latent_shape}, the generator is built for {expected} ({names})"
        )
    if isinstance(dataset, TokenDataset) and dataset.codebook_size != built.codebook_size:
        raise ConfigError(
            f"{where} holds tokens of a codebook of {dataset.codebook_size} entries, the generator is built for "
            f"{built.codebook_size} (model.codebook_size)"
        )
    if dataset.text_embeddings.dim != built.text_dim:
        raise ConfigError(
            f"the text embeddings have {dataset.text_embeddings.dim} channels, the generator is built for "
            f"{built.text_dim} (model.text_dim)"
        )
