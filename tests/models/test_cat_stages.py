"""CAT from coarse to fine: the tokens of a scale, or of a scale's bands, at once."""

import pytest
import torch
from test_cat_transformer import FLOW, TINY, generators, tiny

from favae import CATTransformerModel

STAGES = {
    "next_scale": {"order": "next_scale", "scales": (1, 2, 4), "sample_size": 4},  # 1 + 4 + 16 tokens
    "next_band": {"order": "next_band", "scales": (2, 4), "sample_size": 4},  # 4 + 12
}


def some_tokens(model: CATTransformerModel) -> torch.Tensor:
    return torch.randint(model.config.codebook_size, (2, model.num_tokens))


@pytest.mark.parametrize("order", STAGES)
@pytest.mark.parametrize("attention", ["multi_head", "shared_key_value"])
def test_a_stage_sees_the_stages_before_it_and_nothing_else(order, attention):
    model = tiny(**STAGES[order], attention=attention)
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    expected = model(tokens, text)
    assert expected.logits.shape == (2, model.num_tokens, 16)
    first = 0
    for count in model.steps:
        for k in (first, first + count - 1):
            changed = tokens.clone()
            changed[:, k] = (changed[:, k] + 1) % 16
            different = (model(changed, text).hidden_states - expected.hidden_states).abs().amax(-1) > 1e-6
            assert not different[:, : first + count].any() and different[:, first + count :].all()
        first += count


@pytest.mark.parametrize("order", STAGES)
@pytest.mark.parametrize("attention", ["multi_head", "shared_key_value"])
def test_sampled_stages_are_the_likeliest_given_the_stages_before(order, attention, tmp_path):
    model = tiny(**STAGES[order], attention=attention)
    text, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    steps: list[int] = []
    tokens = model.generate(text, mask, temperature=0.0, callback=steps.append)
    assert torch.equal(tokens, model(tokens, text, mask).logits.argmax(-1)) and steps == list(range(len(model.steps)))

    # guidance grows from the first stage to the last
    guided = model.generate(text, mask, temperature=0.0, guidance_scale=3.0)
    conditional, null = (model(guided, text, m).logits for m in (mask, torch.zeros_like(mask)))
    stages = torch.repeat_interleave(torch.arange(len(model.steps)), torch.tensor(model.steps))
    scale = (1 + 2 * stages / (len(model.steps) - 1)).view(1, -1, 1)
    assert torch.equal(guided, (null + scale * (conditional - null)).argmax(-1))

    # what is saved samples the same; an image does not depend on its batch
    model.save_pretrained(tmp_path)
    drawn = CATTransformerModel.from_pretrained(tmp_path).generate(text, mask, top_p=0.9, generator=generators(0, 1))
    assert torch.equal(drawn, model.generate(text, mask, top_p=0.9, generator=generators(0, 1)))
    assert torch.equal(drawn[1:], model.generate(text[1:], mask[1:], top_p=0.9, generator=generators(1)))


@pytest.mark.parametrize("order", STAGES)
def test_overfits_stages(order):
    torch.manual_seed(0)
    model = CATTransformerModel(**TINY | STAGES[order]).train()
    tokens, text = some_tokens(model), torch.randn(2, 5, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, text).loss.backward()
        optimizer.step()
    assert torch.equal(model.eval().generate(text, top_k=1), tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "next_scale"}, "scales up to"),
        ({"order": "next_scale", "scales": (1, 2)}, "scales up to"),
        ({"order": "next_scale", "scales": (3,)}, "two scales or more"),
        ({"order": "next_scale", "scales": (2, 1, 3)}, "must grow"),
        ({"order": "next_band", "scales": (1, 3)}, "double"),
        ({"order": "next_band", "scales": (1, 3), **FLOW}, "categorical"),
        ({"scales": (1, 3)}, "scales are for"),
        ({"order": "snake"}, "snake"),
    ],
)
def test_orders_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        CATTransformerModel(**TINY | options)
