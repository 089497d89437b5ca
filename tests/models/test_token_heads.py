"""What draws CAT's tokens, without a transformer: categories, and the flow head."""

import pytest
import torch

from favae.models.flow_head import FlowHead
from favae.models.token_heads import sample_categories


def test_categories_are_drawn_as_often_as_they_should():
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probability.log().expand(20000, -1)

    def shares(temperature=1.0, top_k=None, top_p=None):
        categories = sample_categories(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        return categories.bincount(minlength=4) / 20000

    assert torch.allclose(shares(), probability, atol=0.02)
    assert torch.allclose(shares(temperature=2.0), probability.sqrt() / probability.sqrt().sum(), atol=0.02)
    two, three = torch.tensor([4, 3, 0, 0]) / 7, torch.tensor([4, 3, 2, 0]) / 9
    assert torch.allclose(shares(top_k=2), two, atol=0.02)
    assert torch.allclose(shares(top_p=0.65), two, atol=0.02)
    assert torch.allclose(shares(top_p=0.75), three, atol=0.02)
    assert torch.allclose(shares(top_k=9, top_p=1.0), probability, atol=0.02)


@pytest.mark.parametrize("low_channels", [None, 1])
def test_flow_head_learns_two_points(low_channels):
    head = FlowHead(2, 4, 32, 2, low_channels)
    for velocity in head.velocities:
        velocity.initialize_weights()
    hidden = torch.zeros(1, 256, 4)  # (B, N, D) in training, (B, 1, D) in sampling
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(150):
        points = torch.randint(2, (1, 256, 1)) * 2.0 - 1
        loss, _ = head.loss(hidden, points * torch.tensor([1.0, -1.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        one = hidden.transpose(0, 1)
        drawn = head.sample(one, num_steps=50).squeeze(1)
        assert torch.equal(head.sample(one, temperature=0.0)[0], head.sample(one, temperature=0.0)[1])
    near = (drawn.abs() - 1).abs().amax(1) < 0.3
    assert near.float().mean() > 0.9
    assert (drawn[near].prod(1) < 0).float().mean() > 0.97  # the high channel follows the low one
    assert 0.3 < (drawn[:, 0] > 0).float().mean() < 0.7
