"""Hidden states of a generator, aligned with a frozen model's features for the first part of a training."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_LIGHTNINGDIT, run, tiny_generator_recipe

from favae import LightningDiTTransformer2DModel
from favae.data.images import ImageDataset
from favae.data.latents import LatentsWithImages, load_tokenizer, open_latents
from favae.data.sources import open_source
from favae.errors import CacheError, ConfigError
from favae.losses.alignment import representation_alignment
from favae.training.config import GeneratorConfig, load_config
from favae.training.objectives import AlignedTransformer, GeneratorLossConfig, Objective, RepresentationAlignmentConfig


def test_what_features_have_in_common_everywhere_counts_for_nothing():
    features = torch.randn(2, 5, 4, 4)
    normalised = (features - features.mean((2, 3), keepdim=True)) / features.std((2, 3), keepdim=True)
    assert representation_alignment(3 * normalised, features) == pytest.approx(0, abs=1e-5)
    assert representation_alignment(-normalised, features) == pytest.approx(2, abs=1e-5)
    moved = features * torch.rand(2, 5, 1, 1).add(0.5) + torch.randn(2, 5, 1, 1)
    states = torch.randn(2, 5, 4, 4)
    assert torch.allclose(
        representation_alignment(states, moved), representation_alignment(states, features), atol=1e-5
    )
    with pytest.raises(ValueError, match="differ in shape"):
        representation_alignment(states, features[:1])


def test_the_head_sees_the_block_and_the_loss_is_added():
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    trained = AlignedTransformer(transformer, layer=1, channels=5)
    loss = GeneratorLossConfig(alignment=RepresentationAlignmentConfig(weight=0.5, layer=1))
    objective = Objective(loss, transformer)
    latents, labels = torch.randn(2, 6, 4, 4), torch.tensor([0, 1])
    features = torch.randn(2, 5, 4, 4)

    def losses(features):
        torch.manual_seed(0)
        return objective(trained.eval(), latents, labels, features)

    (plain, terms), (total, all_terms) = losses(None), losses(features)
    assert "alignment" not in terms and all_terms["velocity"] == terms["velocity"]
    assert torch.allclose(total, plain + 0.5 * all_terms["alignment"])
    total.backward()
    assert trained.head.weight.grad.abs().sum() > 0
    later = [p.grad for p in transformer.blocks[1].parameters()]
    first = transformer.blocks[0].ff.linear_out.weight.grad.clone()
    trained.zero_grad(set_to_none=True)
    trained.active = False
    losses(None)[0].backward()
    assert trained.head.weight.grad.abs().sum() == 0  # there, for processes that add gradients up
    assert not torch.equal(first, transformer.blocks[0].ff.linear_out.weight.grad)
    for before, parameter in zip(later, transformer.blocks[1].parameters()):  # it comes after what is aligned
        assert torch.allclose(before, parameter.grad, atol=1e-6)


def test_images_come_with_their_latents(tiny_cache):
    images = ImageDataset(open_source(str(tiny_cache / "images")), 16)
    dataset = LatentsWithImages(open_latents(tiny_cache / "cache"), images)
    indices, views = np.array([5, 0, 11, 5]), np.array([1, 0, 1, 0])
    batch = dataset.read(indices, views)
    moments = load_tokenizer(str(tiny_cache / "tokenizer")).encode(batch["image"]).latent_dist
    assert torch.allclose(moments.mean, batch["mean"], atol=1e-4)
    assert torch.equal(batch["image"][0], batch["image"][3].flip(-1))
    images.source.files.pop()
    images.source.sizes.pop()
    with pytest.raises(CacheError, match="was made of 12 images, .* 11"):
        LatentsWithImages(open_latents(tiny_cache / "cache"), images)


def test_training_aligns_until_it_stops(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = [
        f"data.images={tiny_cache / 'images'}",
        "loss.alignment.weight=0.5",
        "loss.alignment.backbone=efficientnet-lite0",
        "loss.alignment.layer=1",
        "loss.alignment.stop_step=3",
        f"output={tiny_cache / 'run'}",
    ]
    run("train_generator.py", recipe, *more, "train.steps=2", processes=2)
    run("train_generator.py", recipe, *more, processes=2)  # goes on
    records = [json.loads(line) for line in (tiny_cache / "run/metrics.jsonl").read_text().splitlines()]
    assert ["alignment" in record for record in records] == [True] * 3 + [False] * 3
    assert (tiny_cache / "run/checkpoints/step-6/head.safetensors").exists()
    assert sorted(p.name for p in (tiny_cache / "run/final").iterdir() if p.is_dir()) == [
        "scheduler",
        "transformer",
        "vae",
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        (["loss.alignment.weight=0.5"], "loss.alignment.layer must be one of 1, 2, got 8"),
        (["loss.alignment.weight=0.5", "loss.alignment.layer=1"], "needs data.images"),
        (["sampling.temperature=-1"], "sampling.temperature must be at least 0"),
        (["sampling.top_p=1.5"], "sampling.top_p must be above 0 and at most 1"),
        (["sampling.top_k=0"], "sampling.top_k must be at least 1"),
        (["loss.alignment.weight=-1"], "loss.alignment.weight must be at least 0"),
        (
            ["loss.alignment.weight=0.5", "loss.alignment.layer=1", "data.images=photos", "train.shard=true"],
            "do not go together",
        ),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(GeneratorConfig, tiny_generator_recipe(tmp_path, "L", "T"), settings)
