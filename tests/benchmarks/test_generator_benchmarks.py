"""What the generator benchmarks compare with is what they say."""

import importlib

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_LIGHTNINGDIT

from favae import CATTransformerModel, LightningDiTTransformer2DModel


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("generator_step")


@torch.no_grad()
def test_the_published_block_computes_the_same(step):
    ours = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT).eval()
    theirs = step.published(LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = ours.state_dict()
    rest = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    for k in range(len(ours.blocks)):

        def take(*names: str, kind: str, k: int = k) -> torch.Tensor:
            return torch.cat([state[f"blocks.{k}.{name}.{kind}"] for name in names])

        layers = {"qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("attn.to_out",)}
        layers |= {"w12": ("ff.gate", "ff.linear_in"), "w3": ("ff.linear_out",), "modulation.1": ("modulation",)}
        for name, parts in layers.items():
            rest |= {f"blocks.{k}.{name}.{kind}": take(*parts, kind=kind) for kind in ("weight", "bias")}
        rest |= {f"blocks.{k}.{name}.weight": take(name, kind="weight") for name in ("norm1", "norm2")}
    missing, unexpected = theirs.load_state_dict(rest, strict=False)
    assert not unexpected and all(name.endswith((".cos", ".sin")) for name in missing)
    arguments = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 3])
    expected = ours(*arguments).sample
    assert expected.std() > 0.1 and torch.allclose(theirs(*arguments).sample, expected, atol=1e-5)


def test_seams_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality = importlib.import_module("generator_quality")
    noise = torch.randn(8, 3, 64, 64)
    assert quality.seams(noise) == pytest.approx(1, abs=0.02)
    patches = torch.randn(8, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert quality.seams(noise + patches) == pytest.approx(2**0.5, abs=0.05)  # differences' variance: 2 + 2 to 2


@torch.no_grad()
def test_tokens_drawn_without_a_cache_are_the_same(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("cat_sampling")
    model = CATTransformerModel(sample_size=3, num_layers=2, num_attention_heads=2, attention_head_dim=8,
                                hidden_size=16, text_dim=8, codebook_size=32).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for place in (model.row_position, model.column_position):
        torch.nn.init.normal_(place, std=3.0)  # else the likeliest token is the last one again
    text, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    drawn = model.generate(text, mask, guidance_scale=3.0, temperature=0)
    assert torch.equal(benchmark.uncached(model, text, mask, 3.0), drawn) and drawn.unique().numel() > 2


def test_images_are_retrieved_by_name_and_category(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("text_to_image")
    names = [["red apple", "apple"], ["tomato", "red apple"], ["cat"], ["green apple"], ["black cat"]]
    emoji = benchmark.Emoji(torch.zeros(5, 3, 64, 64), names, ["food", "food", "animal", "food", "animal"], training=3)
    real = np.eye(5, dtype=np.float32)
    asked = [3, 4, 3, 4]  # the third sample looks like the cat, all others like what they should
    features = real[[3, 4, 2, 4]] + 0.5 * real[[0, 2, 1, 3]]
    monkeypatch.setattr(benchmark, "TOP", (1, 2))
    found = benchmark.retrieved(features, asked, emoji, real)
    assert found["name"] == {"top1": 0.75, "top2": 0.75} and found["chance"]["name"]["top1"] == pytest.approx(0.2)
    assert found["category"] == {"top1": 0.75, "top2": 1.0}
    assert found["chance"]["category"]["top1"] == pytest.approx((3 / 5 + 2 / 5) / 2)
    assert found["among_heldout"]["top1"] >= 0.75 and found["chance"]["among_heldout"]["top1"] == pytest.approx(0.5)
    by_training = benchmark.retrieved(real[:1], [0], emoji, real)
    assert by_training["chance"]["name"]["top1"] == pytest.approx(0.4)  # two emoji have the name
    assert "among_heldout" not in by_training
