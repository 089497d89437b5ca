"""Text encoders with random weights and a vocabulary of a few words, as folders that transformers opens."""

from pathlib import Path

import tokenizers
import transformers

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "red", "apple", "of", "the", "dog"]


def save_tokenizer(folder: Path, max_length: int, begin: bool = True) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>" if begin else "$A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


def save_bert(folder: Path, max_length: int = 12) -> Path:
    config = transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=max_length)
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, max_length)
    return folder


def save_clip(folder: Path) -> Path:
    """Both towers, for 7 positions."""
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 7, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 8, "patch_size": 4})
    transformers.CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder, 7)
    return folder


def save_t5(folder: Path) -> Path:
    """Encoder and decoder."""
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=len(WORDS))
    transformers.T5Model(config).save_pretrained(folder)
    save_tokenizer(folder, int(1e30), begin=False)
    return folder
