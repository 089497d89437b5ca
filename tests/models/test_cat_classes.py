"""CAT from classes, each in the place of a text."""

import pytest
import torch
from test_cat_transformer import HEADS, few_steps, generators, some_tokens, tiny

from favae import CATTransformerModel


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_a_class_stands_in_the_place_of_a_text_of_one_embedding(head, tmp_path):
    model = tiny(**head, text_dim=None, num_classes=3)
    tokens, labels = some_tokens(model), torch.tensor([2, 0])
    torch.manual_seed(1)
    output = model(tokens, class_labels=labels)
    with_text = tiny(**head, text_dim=24)
    with_text.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(1)
    same = with_text(tokens, model.class_embedding.weight[labels].unsqueeze(1))
    assert torch.equal(output.loss, same.loss) and torch.equal(output.hidden_states, same.hidden_states)
    assert not torch.equal(model(tokens, class_labels=labels.flip(0)).hidden_states, output.hidden_states)

    model.save_pretrained(tmp_path)
    loaded = CATTransformerModel.from_pretrained(tmp_path)
    options = {"guidance_scale": 2.0, **few_steps(model)}
    drawn = [one.generate(class_labels=labels, generator=generators(0, 1), **options) for one in (model, loaded)]
    assert torch.allclose(*drawn, atol=1e-4) and drawn[0].shape == tokens.shape

    # In training some classes are left out, with what an empty text leaves.
    without = tiny(**head, text_dim=None, num_classes=3, text_dropout_prob=1.0).train()
    without.load_state_dict(model.state_dict())
    dropped = without(tokens, class_labels=labels).hidden_states
    empty = with_text(tokens, torch.zeros(2, 1, 24), torch.zeros(2, 1)).hidden_states
    assert torch.allclose(dropped, empty, atol=1e-6)


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_costs_can_be_counted_without_memory(head):
    with torch.device("meta"):
        model = tiny(**head, text_dim=None, num_classes=3)
        assert model(some_tokens(model), class_labels=torch.zeros(2, dtype=torch.long)).loss.is_meta


def test_conditions_that_do_not_fit():
    tokens, text, labels = torch.zeros(2, 3, 3, dtype=torch.int64), torch.zeros(2, 5, 6), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        tiny()(tokens, class_labels=labels)
    model = tiny(text_dim=None, num_classes=3)
    with pytest.raises(ValueError, match=r"has 3 classes, got \[0, 3\]"):
        model(tokens, class_labels=labels)
    for condition in ({}, {"encoder_hidden_states": text}, {"encoder_hidden_states": text, "class_labels": labels}):
        with pytest.raises(ValueError, match="needs class_labels"):
            model.generate(**condition)
    for options in ({"num_classes": 3}, {"text_dim": None}):
        with pytest.raises(ValueError, match="either text_dim"):
            tiny(**options)
