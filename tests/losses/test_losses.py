import pytest
import torch
from torch import nn
from torchvision.models import vgg

from favae.errors import MissingWeights
from favae.losses.adversarial import adaptive_weight, hinge_discriminator_loss
from favae.losses.alignment import PrincipalComponents, representation_alignment, vision_foundation_alignment
from favae.losses.flow_matching import flow_matching_loss, interpolate, sample_times
from favae.losses.perceptual import LPIPS


def test_alignment_against_its_formula():
    z, f = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    value = vision_foundation_alignment(z, f, distmat_margin=0.1, cosine_margin=0.2)
    expected = 0.0
    for image in range(2):
        a, b = z[image].flatten(1), f[image].flatten(1)
        cos = nn.functional.cosine_similarity
        distances = sum(
            max(0.0, abs(cos(a[:, i], a[:, j], dim=0) - cos(b[:, i], b[:, j], dim=0)) - 0.1)
            for i in range(12)
            for j in range(12)
        )
        angles = sum(max(0.0, 1 - 0.2 - cos(a[:, i], b[:, i], dim=0)) for i in range(12))
        expected += (distances / 144 + angles / 12) / 2
    assert value.item() == pytest.approx(float(expected), abs=1e-5)


def test_alignment_of_equals_is_zero_and_margins_forgive():
    f = torch.randn(1, 5, 3, 3)
    assert vision_foundation_alignment(3 * f, f, distmat_margin=0, cosine_margin=0).item() == pytest.approx(0, abs=1e-5)
    z = torch.randn(1, 5, 3, 3, requires_grad=True)
    assert vision_foundation_alignment(z, f, distmat_margin=2, cosine_margin=2).item() == 0
    with pytest.raises(ValueError, match="differ in shape"):
        vision_foundation_alignment(z, torch.zeros(1, 5, 2, 2))


def test_hinge_loss():
    assert hinge_discriminator_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == pytest.approx(0.75)


def test_adaptive_weight_balances_gradients_whatever_the_scale():
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    reference, loss = layer(x).square().mean(), layer(x).abs().mean()
    weight = adaptive_weight(reference, loss, [layer.weight], maximum=1e4)
    norm = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in (reference, loss)]
    assert weight.item() == pytest.approx((norm[0] / norm[1]).item(), rel=1e-3)
    scaled = adaptive_weight(1e-6 * reference, 1e-6 * loss, [layer.weight], maximum=1e4)
    assert scaled.item() == pytest.approx(weight.item(), rel=1e-3)
    assert adaptive_weight(reference, 0 * loss, [layer.weight], maximum=7.0).item() == 7.0
    assert not weight.requires_grad


def test_what_features_have_in_common_everywhere_counts_for_nothing():
    features = torch.randn(2, 5, 4, 4)
    normalized = (features - features.mean((2, 3), keepdim=True)) / features.std((2, 3), keepdim=True)
    assert representation_alignment(3 * normalized, features) == pytest.approx(0, abs=1e-5)
    assert representation_alignment(-normalized, features) == pytest.approx(2, abs=1e-5)
    assert torch.isfinite(representation_alignment(features[..., :1, :1], features[..., :1, :1]))
    moved = features * torch.rand(2, 5, 1, 1).add(0.5) + torch.randn(2, 5, 1, 1)
    states = torch.randn(2, 5, 4, 4)
    value, expected = representation_alignment(states, moved), representation_alignment(states, features)
    assert torch.allclose(value, expected, atol=1e-5)
    with pytest.raises(ValueError, match="differ in shape"):
        representation_alignment(states, features[:1])


def test_lpips_from_a_local_file(tmp_path):
    """Its classifier, nine tenths of the file of torchvision, is not looked at."""
    torch.manual_seed(1)
    features = vgg.make_layers(vgg.cfgs["D"])
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    lpips = LPIPS(str(tmp_path / "vgg16.pth"))
    first = dict(lpips.net.net.named_parameters())["slice1.0.weight"]
    assert torch.equal(first, features[0].weight)
    image, other = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64, requires_grad=True)
    assert torch.equal(lpips(image, image), torch.zeros(2))
    assert lpips(other, image).shape == (2,)
    lpips(other, image).mean().backward()
    assert other.grad.abs().sum() > 0
    assert not lpips.train().net.training


def test_missing_lpips_weights_are_named(tmp_path, monkeypatch):
    with pytest.raises(MissingWeights, match="no such file"):
        LPIPS(str(tmp_path / "nothing.pth"))

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.vgg16", unreachable)
    with pytest.raises(MissingWeights, match="vgg16-397923af.pth"):
        LPIPS()


def test_flow_matching_path_and_loss():
    data, noise, times = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.5, 1.0])
    noisy, velocity = interpolate(data, noise, times)
    assert torch.equal(noisy[0], noise[0]) and torch.equal(noisy[2], data[2])
    assert torch.allclose(noisy[1] + 0.5 * velocity[1], data[1], atol=1e-6)
    assert flow_matching_loss(velocity, velocity)[0].item() == pytest.approx(0, abs=1e-6)
    total, terms = flow_matching_loss(-velocity, velocity, cosine_weight=0.5)
    assert terms["cosine"].item() == pytest.approx(2, abs=1e-5)
    assert total.item() == pytest.approx(terms["velocity"].item() + 1.0, rel=1e-5)
    assert set(flow_matching_loss(velocity, velocity, cosine_weight=0)[1]) == {"velocity"}


def test_times():
    times = sample_times(20_000, "logit_normal")
    assert times.min() > 0 and times.max() < 1
    logits = torch.logit(times.double())
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    assert abs(sample_times(20_000, "uniform").mean() - 0.5) < 0.02


def test_shifted_times_have_more_noise():
    torch.manual_seed(0)
    plain = sample_times(1000, "uniform")
    torch.manual_seed(0)
    noise, shifted = 1 - plain, 1 - sample_times(1000, "uniform", shift=3.0)
    torch.testing.assert_close(shifted, 3 * noise / (1 + 2 * noise))


def test_principal_components_are_the_strongest_directions_with_variance_1():
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(6, 6)).Q
    sources = torch.randn(50, 6, 4, 4) * torch.tensor([5.0, 0.1, 3.0, 0.2, 0.1, 1.0])[:, None, None] + 2
    features = torch.einsum("ij,bjhw->bihw", mixing, sources)
    components = PrincipalComponents(6, 3)
    components.fit(features)
    found = components(features).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(torch.cov(found.T, correction=0), torch.eye(3), atol=1e-3)
    strongest = sources[:, [0, 2, 5]].movedim(1, -1).flatten(0, -2)
    correlation = torch.corrcoef(torch.cat([found, strongest], dim=1).T)[:3, 3:].abs()
    assert torch.allclose(correlation, torch.eye(3), atol=0.1)
    with pytest.raises(ValueError, match="fewer than 7 components"):
        PrincipalComponents(6, 7)
