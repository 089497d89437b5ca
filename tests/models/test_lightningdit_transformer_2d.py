import pytest
import torch
from conftest import TINY_LIGHTNINGDIT, checkpointed_blocks
from torch import nn
from torch.nn import functional as F

from favae import LightningDiTTransformer2DModel
from favae.models.flow_head import VelocityMLP
from favae.models.lightningdit_transformer_2d import axial_rotary_embedding


def tiny(**options) -> LightningDiTTransformer2DModel:
    model = LightningDiTTransformer2DModel(**{**TINY_LIGHTNINGDIT, **options}).eval()
    for parameter in model.parameters():  # adaLN-Zero starts as zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("patch_size, wo_shift", [(1, False), (2, False), (1, True)])
def test_forward_save_load(patch_size, wo_shift, tmp_path):
    model = tiny(patch_size=patch_size, wo_shift=wo_shift, qk_norm=True)
    latents, times, labels = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 3])
    output = model(latents, times, labels).sample
    assert output.shape == latents.shape
    assert torch.equal(model(latents, times, labels, return_dict=False)[0], output)
    model.save_pretrained(tmp_path)
    loaded = LightningDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(latents, times, labels).sample, output)


class QuantizedLinear(nn.Linear):
    """As those of libraries: integers, which a scale makes the weights of, and a bias in the dtype of the inputs."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, sample):
        return F.linear(sample, self.weight.to(sample.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("part", ["time_embedding", "flow_head"])
def test_quantized_weights_do_not_make_times_integers(part):
    torch.manual_seed(0)
    if part == "time_embedding":
        model, inputs = tiny(), (torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 3]))
    else:
        model, inputs = VelocityMLP(4, dim=8, width=16, num_layers=1), (torch.randn(2, 4), torch.rand(2, 1))
        inputs = (*inputs, torch.randn(2, 16))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    expected = model(*inputs)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, QuantizedLinear(module))
    found = model(*inputs)
    expected, found = (output if isinstance(output, torch.Tensor) else output.sample for output in (expected, found))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "layers, heads, head_dim, published",
    [(12, 12, 64, 130.6), (24, 16, 64, 458.2), (28, 16, 72, 675.26), (24, 24, 64, 1029), (28, 28, 64, 1632)],
)
def test_published_sizes(layers, heads, head_dim, published):
    with torch.device("meta"):
        model = LightningDiTTransformer2DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim
        )
    # the published counts include the fixed positions, which are no parameters here
    count = model.num_parameters() + model.patch_embed.pos_embed.numel()
    assert count / 1e6 == pytest.approx(published, abs=0.05 if published < 1000 else 1)


def test_starts_at_zero_and_learns():
    model = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)
    latents, times, labels = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 1])
    assert torch.equal(model(latents, times, labels).sample, torch.zeros_like(latents))
    model(latents, times, labels).sample.sub(latents).square().mean().backward()
    assert model.proj_out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("heads, head_dim", [(2, 32), (4, 64), (16, 72)])
def test_layers_start_as_rows_of_the_published_matrices(heads, head_dim):
    """Published are one matrix for queries, keys and values, and one for both halves of SwiGLU."""
    shape = {"num_layers": 1, "num_attention_heads": heads, "attention_head_dim": head_dim, "num_classes": 3}
    model = LightningDiTTransformer2DModel(**shape)
    width, block = heads * head_dim, model.blocks[0]
    hidden = int(2 / 3 * 4 * width)
    outputs = {"attn.to_q": 3, "attn.to_k": 3, "attn.to_v": 3, "attn.to_out": 1}
    rows = {name: parts * width for name, parts in outputs.items()} | {
        "ff.gate": 2 * hidden,
        "ff.linear_in": 2 * hidden,
    }
    for name, published_rows in (rows | {"ff.linear_out": width}).items():
        weight = block.get_submodule(name).weight
        published = torch.nn.init.xavier_uniform_(torch.empty(published_rows, weight.shape[1]))
        assert weight.std().item() == pytest.approx(published.std().item(), rel=0.03), name
        assert weight.abs().max().item() == pytest.approx(published.abs().max().item(), rel=0.01), name
    if width == 1152:  # XL/1, in numbers
        assert block.attn.to_q.weight.std().item() == pytest.approx(0.02083, abs=1e-4)
        assert block.ff.gate.weight.std().item() == pytest.approx(0.01656, abs=1e-4)


def test_time_class_and_place_matter():
    model = tiny()
    latents, times, labels = torch.randn(1, 6, 4, 4), torch.tensor([0.3]), torch.tensor([1])
    output = model(latents, times, labels).sample
    assert not torch.allclose(model(latents, torch.tensor([0.301]), labels).sample, output)
    assert not torch.allclose(model(latents, times, torch.tensor([2])).sample, output)
    assert not torch.allclose(model(latents.flip(-1), times, labels).sample.flip(-1), output, atol=1e-3)


def test_rotary_embedding_depends_on_the_offset_only():
    cos, sin = axial_rotary_embedding(4, 8)
    query, key = torch.randn(8), torch.randn(8)

    def turn(x, place):
        pairs = x.view(-1, 2)
        turned = torch.stack([-pairs[:, 1], pairs[:, 0]], dim=1).flatten()
        return x * cos[place] + turned * sin[place]

    def score(q_place, k_place):
        return (turn(query, q_place) * turn(key, k_place)).sum()

    one_right_one_down = [
        score(row * 4 + column, (row + 1) * 4 + column + 1) for row in range(3) for column in range(3)
    ]
    assert torch.allclose(torch.stack(one_right_one_down), one_right_one_down[0], atol=1e-5)
    assert not torch.allclose(score(0, 1), score(0, 4))  # a step right is not a step down


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny(class_dropout_prob=0.0).train()
    arguments = (torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    model(*arguments).sample.square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    blocks = checkpointed_blocks(model)
    model(*arguments).sample.square().mean().backward()
    assert blocks == list(model.blocks)
    assert all(torch.allclose(p.grad, e, atol=1e-6) for p, e in zip(model.parameters(), expected))


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 4, 4\)"):
        tiny()(torch.zeros(1, 6, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_time_norms_and_the_residual_stream_stay_in_float32_under_autocast():
    model = tiny().eval()
    seen = {}

    def watch(name):
        def hook(module, inputs, output):
            seen[name] = (output if isinstance(output, torch.Tensor) else output[0]).dtype

        return hook

    for name in ("time_embedding", "blocks.0.norm1", "blocks.0.norm2", "norm_out", "blocks.0", "blocks.0.ff.gate"):
        model.get_submodule(name).register_forward_hook(watch(name))
    arguments = (torch.randn(2, 6, 4, 4), torch.tensor([0.5, 0.5004]), torch.tensor([1, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        model(*arguments)
    assert seen.pop("blocks.0.ff.gate") == torch.bfloat16
    assert set(seen.values()) == {torch.float32} and len(seen) == 5
    half = tiny().to(torch.bfloat16)  # as a pipeline runs it
    assert half(arguments[0].bfloat16(), *arguments[1:]).sample.dtype == torch.bfloat16


# Texts ----------------------------------------------------------------------------------------------------------------


def of_texts(**options) -> LightningDiTTransformer2DModel:
    return tiny(**{"num_classes": 0, "text_dim": 8, **options})


def text(length: int = 5, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, length, 8, generator=generator), torch.ones(count, length, dtype=torch.bool)


def test_words_matter_and_padding_does_not():
    model, (embeddings, mask) = of_texts(), text()
    latents, times = torch.randn(2, 6, 4, 4), torch.tensor([0.3, 0.8])
    output = model(latents, times, None, embeddings, mask).sample
    assert torch.equal(model(latents, times, None, embeddings).sample, output)  # no mask: text everywhere
    other = embeddings.clone()
    other[:, 2] += 1
    assert not torch.allclose(model(latents, times, None, other, mask).sample, output, atol=1e-4)
    padded, longer = torch.nn.functional.pad(embeddings, (0, 0, 0, 3), value=torch.inf), torch.ones(2, 8).bool()
    longer[:, 5:] = False
    torch.testing.assert_close(model(latents, times, None, padded, longer).sample, output)
    swapped = embeddings[:, [1, 0, 2, 3, 4]]  # of frozen encoders, whose embeddings know their places
    torch.testing.assert_close(model(latents, times, None, swapped, mask).sample, output)


def test_texts_are_left_out_as_a_whole():
    model, (embeddings, mask) = of_texts(text_dropout_prob=1.0), text()
    latents, times = torch.randn(2, 6, 4, 4), torch.tensor([0.3, 0.8])
    without = model(latents, times, None, embeddings, torch.zeros_like(mask)).sample
    assert not torch.allclose(model(latents, times, None, embeddings, mask).sample, without, atol=1e-4)
    model.train()
    torch.testing.assert_close(model(latents, times, None, embeddings, mask).sample, without)


def test_classes_and_texts_together():
    model, (embeddings, mask) = tiny(text_dim=8), text()
    latents, times = torch.randn(2, 6, 4, 4), torch.tensor([0.3, 0.8])
    outputs = [model(latents, times, torch.tensor(labels), embeddings, mask).sample for labels in ([0, 1], [2, 2])]
    assert not torch.allclose(*outputs, atol=1e-4)


def test_a_class_and_a_text_are_left_out_together():
    """Guidance leads away from neither of them."""
    model = of_texts(num_classes=3, class_dropout_prob=0.5, text_dropout_prob=0.5)
    seen = []
    model.class_embedding.embedding_table.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    embeddings, mask = text(count=200)
    model.text_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].any(1)))
    model.train()(torch.randn(200, 6, 4, 4), torch.rand(200), torch.zeros(200, dtype=torch.long), embeddings, mask)
    labels, has_text = seen
    assert torch.equal(labels == 0, has_text) and set(labels.tolist()) == {0, 3} and 60 < has_text.sum() < 140


def test_a_new_model_of_texts_gives_zero_and_every_parameter_learns():
    torch.manual_seed(0)
    model, (embeddings, mask) = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT | {"text_dim": 8}), text()
    arguments = (torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 1]), embeddings, mask)
    assert not model(*arguments).sample.any()
    model = tiny(text_dim=8, class_dropout_prob=0.0, text_dropout_prob=0.0).train()
    model(*arguments).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    blocks = checkpointed_blocks(model)
    model(*arguments).sample.square().mean().backward()
    assert blocks == list(model.blocks)
    assert all(torch.allclose(p.grad, e, atol=1e-5) for p, e in zip(model.parameters(), expected))


@pytest.mark.parametrize(
    "options, arguments, named",
    [
        ({}, {}, "needs class_labels"),
        ({"num_classes": 0}, {"class_labels": torch.zeros(1).long()}, "takes no class_labels"),
        ({"num_classes": 0, "text_dim": 8}, {}, "needs encoder_hidden_states"),
        ({"num_classes": 0}, {"encoder_hidden_states": torch.zeros(1, 2, 8)}, "takes no encoder_hidden_states"),
    ],
)
def test_a_condition_that_does_not_fit(options, arguments, named):
    with pytest.raises(ValueError, match=named):
        tiny(**options)(torch.randn(1, 6, 4, 4), torch.rand(1), **arguments)
