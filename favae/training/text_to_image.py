"""What is particular to training a text-to-image generator: captions' states, the loss, the pipeline, sample grids."""

from pathlib import Path

from diffusers import ModelMixin
from torch import Tensor, nn

from favae.data.latents import LatentDataset
from favae.data.shards import read_captions
from favae.data.text import FOLDER, CaptionStates
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
        dataset: with the states of captions.
        transformer: as built.
    Raises:
        ConfigError: if the transformer was built for other tokens or texts.
        MissingWeights: if the text encoder of the captions' states cannot be opened.
    """

    def __init__(
        self, config: GeneratorConfig, tokenizer: ModelMixin, dataset: LatentDataset, transformer: CATTransformerModel
    ):
        self.config, self.dataset = config, dataset
        check_shapes(config, transformer, dataset)
        name = config.data.text_encoder or dataset.text.encoder
        try:
            with hint("data.text_encoder takes a local folder"):
                encoder = TextEncoder(name, dataset.text.max_length)
        except ValueError as error:
            raise ConfigError(f"data.text_encoder: {error}; the captions' states have that length") from error
        if encoder.hash != dataset.text.hash:
            raise ConfigError(
                f"data.text_encoder: {name} has other weights than the encoder of the captions' states; give that one"
            )
        if dataset.kind == "moments":
            keys = ("latents_mean", "latents_std")
            statistics = {key: dataset.manifest[key] for key in keys}
            tokenizer.register_to_config(**statistics, scaling_factor=1.0, shift_factor=0.0)
        self.pipeline = CATPipeline(transformer, tokenizer, encoder.model, encoder.tokenizer, encoder.max_length)
        self.prompts = config.sampling.prompts or first_captions(dataset, config.sampling.num_images)

    def loss(self, model: nn.Module, batch: dict, features: None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that the dataset gave, and its name for the log."""
        tokens = batch["tokens"] if self.dataset.kind == "tokens" else self.dataset.draw(batch)
        loss, *_ = model(tokens, batch["text"], batch["text_mask"], return_dict=False)
        return loss, {"cross_entropy" if self.dataset.kind == "tokens" else "velocity": loss.detach()}

    def samples(self) -> tuple[dict, int]:
        """What the pipeline is called with for the grid of samples, and how many images make a row."""
        sampling = self.config.sampling
        prompts = [self.prompts[i % len(self.prompts)] for i in range(sampling.num_images)]
        options = {"prompt": prompts, "temperature": sampling.temperature}
        if self.dataset.kind == "tokens":
            return {**options, "top_k": sampling.top_k, "top_p": sampling.top_p}, 8
        return {**options, "num_head_steps": sampling.num_inference_steps}, 8


def open_states(config: GeneratorConfig) -> CaptionStates:
    """The states of captions that `favae.data.text` wrote beside the latents, or elsewhere."""
    return CaptionStates(config.data.text or Path(config.data.latents) / FOLDER)


def first_captions(dataset: LatentDataset, count: int) -> list[str]:
    """The first caption of each of the first images that have one."""
    found: list[str] = []
    for number, size in enumerate(dataset.manifest["counts"]):
        found += [captions[0] for captions in read_captions(dataset.folder, number, size) if captions]
        if len(found) >= count:
            break
    return found[:count]


def check_shapes(config: GeneratorConfig, transformer: CATTransformerModel, dataset: LatentDataset) -> None:
    """Raises ConfigError if the transformer was built for other tokens than the cache holds, or other texts."""
    built, where = transformer.config, config.data.latents
    if (built.head == "categorical") != (dataset.kind == "tokens"):
        raise ConfigError(f"{where} holds {dataset.kind}; model.head={built.head} is for the other kind of cache")
    size = (built.sample_size, built.sample_size)
    if dataset.kind == "moments":
        names, expected = "model.latent_channels, model.sample_size", (built.latent_channels, *size)
    else:
        more = (built.num_quantizers,) if built.num_quantizers > 1 else ()
        names, expected = "model.sample_size, model.num_quantizers", (*size, *more)
    if dataset.latent_shape != expected:
        raise ConfigError(
            f"{where} holds {dataset.kind} of shape {dataset.latent_shape}, the generator is built for {expected} "
            f"({names})"
        )
    if dataset.kind == "tokens" and dataset.codebook_size != built.codebook_size:
        raise ConfigError(
            f"{where} holds tokens of a codebook of {dataset.codebook_size} entries, the generator is built for "
            f"{built.codebook_size} (model.codebook_size)"
        )
    if dataset.text.dim != built.text_dim:
        raise ConfigError(
            f"the states of the captions have {dataset.text.dim} channels, the generator is built for "
            f"{built.text_dim} (model.text_dim)"
        )
