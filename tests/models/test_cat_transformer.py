import pytest
import torch
from conftest import checkpointed_blocks

from favae import CATTransformerModel
from favae.errors import NonFiniteError
from favae.models.cat_block import RelativePosition
from favae.models.flow_head import FlowHead
from favae.models.token_heads import CategoricalHead, guide

TINY = {
    "sample_size": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "hidden_size": 24,
    "text_dim": 6,
    "codebook_size": 16,
    "head_width": 16,
    "head_layers": 1,
}
FLOW = {"head": "flow", "latent_channels": 4}
HEADS = {
    "codes": {},
    "residual codes": {"num_quantizers": 3},
    "latents": FLOW,
    "low, then high": {**FLOW, "low_latent_channels": 3},
}
LAYOUTS = [
    {"attention": attention, "relative_position": relative}
    for attention in ("multi_head", "shared_key_value")
    for relative in (False, True)
]


def tiny(**options) -> CATTransformerModel:
    model = CATTransformerModel(**{**TINY, **options}).eval()
    for parameter in model.parameters():  # the flow head starts as zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def some_tokens(model: CATTransformerModel, batch: int = 2) -> torch.Tensor:
    config = model.config
    if config.head == "flow":
        return torch.randn(batch, config.latent_channels, 3, 3)
    codes = (config.num_quantizers,) if config.num_quantizers > 1 else ()
    return torch.randint(config.codebook_size, (batch, 3, 3, *codes))


def few_steps(model: CATTransformerModel) -> dict:
    return {"num_head_steps": 4} if model.config.head == "flow" else {}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=HEADS)
def head(request) -> dict:
    return HEADS[request.param]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def layout(request) -> dict:
    return request.param


def test_forward_save_load(head, tmp_path):
    model = tiny(**head, relative_position=True, attention="shared_key_value")
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    torch.manual_seed(1)
    output = model(tokens, text)
    assert output.loss.ndim == 0 and output.loss.dtype == torch.float32
    assert output.hidden_states.shape == (2, 9, 24)
    if model.config.head == "flow":
        assert output.logits is None
    else:
        codes = (3,) if model.config.num_quantizers == 3 else ()
        assert output.logits.shape == (2, 9, *codes, 16)
        expected = torch.nn.functional.cross_entropy(output.logits.reshape(-1, 16), tokens.flatten())
        assert torch.allclose(output.loss, expected)
    torch.manual_seed(1)
    assert torch.equal(model(tokens, text, return_dict=False)[0], output.loss)
    model.save_pretrained(tmp_path)
    loaded = CATTransformerModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens, text).hidden_states, output.hidden_states)
    drawn = [one.generate(text, generator=generators(0, 1)) for one in (model, loaded)]
    assert torch.allclose(*drawn, atol=1e-4)  # where weights lie in memory changes the rounding
    assert drawn[0].shape == tokens.shape and drawn[0].dtype == tokens.dtype


def test_published_size():
    with torch.device("meta"):
        model = CATTransformerModel(attention="shared_key_value", relative_position=True)
    assert model.num_parameters() / 1e6 == pytest.approx(611, rel=0.02)


def test_a_token_changes_what_comes_after_it_and_nothing_else(head, layout):
    model = tiny(**head, **layout)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    expected = model(tokens, text).hidden_states
    for k in range(9):
        changed, other = model.token_head.to_sequence(tokens).clone(), model.token_head.to_sequence(some_tokens(model))
        changed[:, k] = torch.where(other[:, k] == changed[:, k], (other[:, k] + 1) % 16, other[:, k])
        hidden_states = model(model.token_head.to_grid(changed, 3), text).hidden_states
        assert torch.equal(hidden_states[:, : k + 1], expected[:, : k + 1])
        different = (hidden_states - expected).abs().amax(-1)[:, k + 1 :]
        assert (different > 1e-5).all()


def test_later_codes_of_a_position_see_the_earlier_ones():
    model = tiny(num_quantizers=3)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    expected = model(tokens, text).logits
    for q in range(3):
        changed = tokens.clone()
        changed[:, -1, -1, q] = (changed[:, -1, -1, q] + 1) % 16  # the last position, which no other sees
        different = (model(changed, text).logits - expected).abs().amax((0, 1, 3)) > 1e-5
        assert different.tolist() == [later > q for later in range(3)]


def test_cached_steps_agree_with_the_whole(head, layout):
    model = tiny(**head, **layout)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    output = model(tokens, text, mask)
    embeddings = model.token_head.embed(model.token_head.to_sequence(tokens))
    cache = model.start(text, mask)
    steps = [model.step(None if k == 0 else embeddings[:, k - 1 : k], cache) for k in range(9)]
    assert torch.allclose(torch.cat(steps, dim=1), output.hidden_states, atol=1e-4)
    if output.logits is not None:
        first = output.logits if output.logits.ndim == 3 else output.logits[:, :, 0]
        logits = torch.cat(steps, dim=1) @ model.token_head.embedding.weight[:16].T
        assert torch.allclose(logits, first, atol=1e-4)
    with pytest.raises(ValueError, match="position 9 of 9"):
        model.step(embeddings[:, -1:], cache)


@pytest.mark.parametrize("attention", ["multi_head", "shared_key_value"])
def test_padding_has_no_influence_and_words_have(attention):
    model = tiny(attention=attention)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    expected = model(tokens, text, mask).logits
    assert torch.allclose(model(tokens, text[:, :3]).logits, expected, atol=1e-5)
    padding = text.clone()
    padding[:, 3] = torch.nan
    padding[:, 4] = torch.inf
    assert torch.equal(model(tokens, padding, mask.bool()).logits, expected)
    drawn = [model.generate(one, mask, guidance_scale=2.0, generator=generators(0, 1)) for one in (text, padding)]
    assert torch.equal(*drawn)
    for word in range(3):
        other = text.clone()
        other[:, word] += 1
        assert ((model(tokens, other, mask).logits - expected).abs().amax((1, 2)) > 1e-4).all()
    turned = model(tokens, text[:, [2, 1, 0, 3, 4]], mask).logits  # places in the text are the text encoder's business
    assert torch.allclose(turned, expected, atol=1e-5)


def test_pooled_texts_are_one_vector():
    torch.manual_seed(0)
    model, plain = tiny(text_pooling="mean"), tiny()
    plain.load_state_dict(model.state_dict())
    tokens, text, mask = some_tokens(model), torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    means = torch.stack([text[0, :3].mean(0), text[1, 0]]).unsqueeze(1)
    expected = plain(tokens, means).logits
    assert torch.allclose(model(tokens, text, mask).logits, expected, atol=1e-5)
    assert not torch.allclose(plain(tokens, text, mask).logits, expected, atol=1e-3)
    drawn = [model.generate(text, mask, generator=generators(0, 1)), plain.generate(means, generator=generators(0, 1))]
    assert torch.equal(*drawn)
    nothing = [model(tokens, text[:, :0]), model(tokens, text, torch.zeros(2, 5)), plain(tokens, text[:, :0])]
    assert all(torch.allclose(one.logits, nothing[0].logits, atol=1e-5) for one in nothing)


@pytest.mark.parametrize("attention", ["multi_head", "shared_key_value"])
def test_a_dropped_text_is_an_empty_one(attention):
    model = tiny(attention=attention, text_dropout_prob=1.0)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    empty = model(tokens, text[:, :0]).logits
    assert torch.allclose(model(tokens, text, torch.zeros(2, 5)).logits, empty, atol=1e-5)
    assert torch.allclose(model.train()(tokens, text).logits, empty, atol=1e-5)
    assert not torch.allclose(model.eval()(tokens, text).logits, empty, atol=1e-3)


def test_texts_are_dropped_one_by_one():
    model = tiny(text_dropout_prob=0.25).train()
    tokens, text = some_tokens(model, 1).expand(400, -1, -1), torch.randn(1, 5, 6).expand(400, -1, -1)
    empty = model(tokens[:1], text[:1, :0]).logits
    dropped = ((model(tokens, text).logits - empty).abs().amax((1, 2)) < 1e-5).float().mean()
    assert 0.15 < dropped < 0.35


def test_an_image_does_not_depend_on_its_batch(head):
    model = tiny(**head)
    text = torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    options = {"guidance_scale": 2.0, **few_steps(model)}
    together = model.generate(text, mask, generator=generators(0, 1, 2), **options)
    for i in range(3):
        alone = model.generate(text[i : i + 1], mask[i : i + 1], generator=generators(i), **options)
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    assert not torch.equal(*model.generate(text[:1].expand(2, -1, -1), generator=generators(0, 1)))
    single = [model.generate(text, generator=generators(5)[0]) for _ in range(2)]
    assert torch.equal(*single)


def test_guidance(head):
    model = tiny(**head)
    text = torch.randn(2, 5, 6)

    def drawn(scale, mask=None):
        return model.generate(text, mask, guidance_scale=scale, generator=generators(0, 1), **few_steps(model))

    assert torch.allclose(drawn(1.0), drawn(1 + 1e-6), atol=1e-3)  # the latter goes through the doubled batch
    assert not torch.allclose(drawn(1.0), drawn(6.0), atol=1e-2)
    null = torch.zeros(2, 5)
    assert torch.allclose(drawn(1.0, null), drawn(6.0, null), atol=1e-3)  # nothing to lead away from
    conditional, null = torch.randn(2, 2, 7)
    expected = null + 3 * (conditional - null)
    assert torch.equal(guide(torch.cat([conditional, null]), 3.0), expected)
    with pytest.raises(ValueError, match="text_dropout_prob"):
        tiny(text_dropout_prob=0.0).generate(text, guidance_scale=2.0)


def test_one_candidate_is_the_likeliest():
    model = tiny()
    text = torch.randn(2, 5, 6)
    greedy = model.generate(text, top_k=1)
    assert torch.equal(model(greedy, text).logits.argmax(-1).view(2, 3, 3), greedy)
    assert torch.equal(model.generate(text, temperature=0.0), greedy)
    assert torch.equal(model.generate(text, top_p=1e-6), greedy)


def test_every_token_is_reported():
    seen = []
    tiny().generate(torch.randn(1, 5, 6), callback=seen.append)
    assert seen == list(range(9))


def test_one_graph_serves_all_positions_but_the_first():
    model, text = tiny(attention="shared_key_value", relative_position=True), torch.randn(2, 5, 6)
    expected = model.generate(text, generator=generators(0, 1))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):  # more would be an error
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert torch.equal(model.generate(text, generator=generators(0, 1)), expected)


def test_relative_positions_are_those_of_the_cells():
    size = 4
    index = RelativePosition(size, 2).index
    offsets = {}
    for query in range(size**2):  # the cell that is predicted
        for slot in range(1, query + 1):  # holds the token of cell slot - 1
            cell = slot - 1
            offset = (query // size - cell // size, query % size - cell % size)
            offsets.setdefault(offset, set()).add(int(index[query, slot]))
    assert all(len(entries) == 1 for entries in offsets.values())
    assert len(set.union(*offsets.values())) == len(offsets)  # different offsets have different entries
    start = set(index[:, 0].tolist())
    assert len(start) == 1 and start.isdisjoint(set.union(*offsets.values()))


@pytest.mark.parametrize("text_dropout_prob", [0.0, 1.0])
def test_every_parameter_has_a_gradient(head, layout, text_dropout_prob):
    model = tiny(**head, **layout, text_dropout_prob=text_dropout_prob).train()
    model(some_tokens(model), torch.randn(2, 5, 6)).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not unused  # DistributedDataParallel would wait for them
    still = {name for name, parameter in model.named_parameters() if parameter.grad.abs().sum() == 0}
    if text_dropout_prob:
        # A softmax over the one key that is left is 1, whatever is asked; its gradient is zero, or rounding errors.
        nothing_to_ask = ("cross_attn.to_", "norm2", "null_key")
        assert all(any(part in name for part in nothing_to_ask) for name in still)
    else:
        assert not still


def test_gradient_checkpointing_gives_the_same_gradients(head):
    model = tiny(**head, text_dropout_prob=0.0, dropout=0.1).train()
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(tokens, text).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    blocks = checkpointed_blocks(model)
    assert all(torch.allclose(gradient, e, atol=1e-6) for gradient, e in zip(gradients(), expected))
    assert blocks == list(model.blocks)


@pytest.mark.parametrize("head", ["codes", "residual codes"])
def test_learns_four_pairs_by_heart(head):
    model = CATTransformerModel(**{**TINY, **HEADS[head]})
    tokens, text = some_tokens(model, 4), torch.randn(4, 5, 6)
    tokens[1, 0] = tokens[0, 0]  # the text must tell them apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(tokens, text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model(tokens, text).loss < 0.05
    assert torch.equal(model.generate(text, top_k=1), tokens)
    assert torch.equal(model.generate(text, top_k=1, guidance_scale=1.5), tokens)


def test_high_channels_are_drawn_given_the_low_ones():
    model = tiny(**HEADS["low, then high"])
    head, hidden = model.token_head, torch.randn(1, 1, 24).expand(2, -1, -1)
    noise = torch.randn(2, 1, 3), torch.randn(1, 1, 1).expand(2, -1, -1)  # of the low channels, and the high ones
    draws = iter(noise)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("favae.models.flow_head.randn_tensor", lambda *arguments: next(draws))
        drawn = head.sample(hidden)
    assert (drawn[0, 0, 3] - drawn[1, 0, 3]).abs() > 1e-4


def test_runs_in_half_precision(head):
    model = tiny(**head, attention="shared_key_value", relative_position=True)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    torch.manual_seed(1)
    expected = model(tokens, text).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        output = model(tokens, text)
        assert model.generate(text, guidance_scale=2.0, **few_steps(model)).shape == tokens.shape
    assert output.hidden_states.dtype == torch.float32  # the residual stream
    assert output.loss.dtype == torch.float32 and torch.allclose(output.loss, expected, rtol=0.05)
    half = model.to(torch.bfloat16)  # as a pipeline runs it
    assert half.generate(text, guidance_scale=2.0, **few_steps(model)).shape == tokens.shape
    torch.manual_seed(1)
    assert torch.allclose(half(tokens, text).loss, expected, rtol=0.05)


def test_costs_can_be_counted_without_memory(head):
    with torch.device("meta"):
        model = CATTransformerModel(**{**TINY, **head})
        assert model(some_tokens(model), torch.zeros(2, 5, 6), torch.ones(2, 5)).loss.is_meta


def test_what_does_not_fit_is_refused():
    model, text = tiny(), torch.randn(2, 5, 6)
    tokens = some_tokens(model)
    for wrong, message in [
        (torch.full_like(tokens, 16), "16"),
        (torch.zeros(2, 4, 4, dtype=torch.long), r"\(3, 3\)"),
        (tokens.float(), "int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(wrong, text)
    with pytest.raises(ValueError, match=r"\(4, 3, 3\)"):
        tiny(**FLOW)(torch.zeros(2, 4, 4, 4), text)
    with pytest.raises(ValueError, match="mask"):
        model(tokens, text, torch.ones(2, 4))
    with pytest.raises(RuntimeError):
        model(tokens, torch.zeros(3, 5, 6))
    for options, message in [
        ({"head": "gaussian"}, "head"),
        ({"attention": "linear"}, "attention"),
        ({"text_pooling": "max"}, "text_pooling"),
        ({"head": "flow"}, "latent_channels"),
        ({**FLOW, "num_quantizers": 2}, "num_quantizers"),
        ({"latent_channels": 4}, "latent_channels"),
        ({**FLOW, "low_latent_channels": 4}, "low_latent_channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny(**options)
    for options, message in [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_head_steps": 2}, "num_head_steps"),  # of the other head
        ({"generator": generators(0)}, "1 generators for 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(text, **options)
    for options in ({"top_k": 1}, {"top_p": 0.5}, {"num_head_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tiny(**FLOW).generate(text, **options)
    with pytest.raises(ValueError, match="offloading"):
        model.enable_group_offload(torch.device("cpu"))


def test_codes_and_latents_keep_their_places():
    codes, latents = torch.randint(16, (2, 3, 3, 2)), torch.randn(2, 4, 3, 3)
    head = CategoricalHead(16, 8, 2)
    assert torch.equal(head.to_sequence(codes)[:, 5], codes[:, 1, 2])
    assert torch.equal(head.to_grid(head.to_sequence(codes), 3), codes)
    first, second = head.embedding.weight.split(16)  # each codebook has embeddings of its own
    assert torch.allclose(
        head.embed(head.to_sequence(codes))[0, 5], first[codes[0, 1, 2, 0]] + second[codes[0, 1, 2, 1]]
    )
    head = FlowHead(4, 8, 8, 1)
    assert torch.equal(head.to_sequence(latents)[:, 5], latents[:, :, 1, 2])
    assert torch.equal(head.to_grid(head.to_sequence(latents), 3), latents)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("broken", ["norm_out.bias", "row_position", "token_head"])
def test_hidden_states_that_are_not_finite_are_an_error(head, broken):
    """Indices would not show it."""
    model = tiny(**HEADS[head])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(broken):
                parameter.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="float32"):
        model.generate(torch.randn(2, 3, 6), **few_steps(model))
