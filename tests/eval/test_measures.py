import numpy as np
import pytest
import torch
from conftest import write_images
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from favae.data.images import ImageDataset, open_source
from favae.eval.features import FeatureExtractor, image_generator
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.generation import inception_score, measure, precision_recall
from favae.eval.reconstruction import evaluate_reconstruction, image_errors
from favae.foundation import MissingWeights


def test_recon_is_made_of_low_and_high():
    images = torch.rand(4, 3, 16, 24) * 2 - 1
    errors = image_errors(images, images + 0.3 * torch.randn_like(images))
    recon, low, high = errors[:, 0], errors[:, 1], errors[:, 2]
    assert torch.allclose(recon, (low + 3 * high) / 4, rtol=1e-5)
    assert torch.isnan(errors[:, 5]).all()


def test_psnr_and_ssim_by_hand():
    images = torch.zeros(1, 3, 16, 16)
    errors = image_errors(images, images + 20 / 127.5)  # 20 of 255 levels everywhere
    assert errors[0, 3].item() == pytest.approx(20 * np.log10(255 / 20), abs=1e-4)
    same = image_errors(images, images)[0]
    assert same[0] == 0 and same[3] == 100 and same[4] == pytest.approx(1)


def test_frechet_of_gaussians_in_closed_form():
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert frechet_distance(np.zeros(3), a, np.array([1.0, 2.0, 2.0]), b) == pytest.approx(9 + 1 + 0 + 4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotated = [rotation @ m @ rotation.T for m in (a, b)]
    assert frechet_distance(np.zeros(3), rotated[0], np.zeros(3), rotated[1]) == pytest.approx(5)
    with pytest.raises(ValueError, match="different sizes"):
        frechet_distance(np.zeros(3), a, np.zeros(2), np.eye(2))


@pytest.mark.parametrize("count", [300, 40])  # 40 < 64 dimensions: rank-deficient
def test_agreement_with_torch_fidelity(count):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(count, 64)), rng.normal(0.3, 1.2, size=(count, 64))
    ours = frechet_distance(*feature_statistics(real), *feature_statistics(fake))
    theirs = fid_statistics_to_metric(
        dict(zip(("mu", "sigma"), feature_statistics(real))),
        dict(zip(("mu", "sigma"), feature_statistics(fake))),
        verbose=False,
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert abs(frechet_distance(*feature_statistics(real), *feature_statistics(real))) < 1e-3
    logits = rng.normal(size=(count, 10)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    ours = inception_score(logits, splits=4)
    assert ours[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    ours = precision_recall(real.astype(np.float32), fake.astype(np.float32), tile=17)
    theirs = prc_features_to_metric(
        torch.from_numpy(real).float(), torch.from_numpy(fake).float(), prc_neighborhood=3, verbose=False
    )
    found = sorted((theirs["precision"], theirs["recall"]))  # which is which depends on the order of its arguments
    assert sorted(ours) == pytest.approx(found, abs=1e-3)


def test_precision_and_recall_know_which_is_which():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 8))
    collapsed = real[:1] + 1e-3 * rng.normal(size=(400, 8))
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.02
    scattered = 10 * rng.normal(size=(400, 8))
    assert precision_recall(real, scattered)[0] < 0.05


def test_inception_score_extremes():
    sure = 50 * np.eye(10)[np.arange(100) % 10]
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-3)
    assert inception_score(np.zeros((100, 10)), splits=1)[0] == pytest.approx(1)
    rng = np.random.default_rng(0)
    assert measure(rng.normal(size=(50, 4)), rng.normal(size=(60, 4)), None)["is"] is None


def test_seeds_belong_to_images():
    draws = {torch.rand(1, generator=image_generator(seed, index)).item() for seed in range(3) for index in range(50)}
    assert len(draws) == 150


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor("efficientnet-lite0")


def test_numbers_on_other_features_are_not_called_fid(extractor):
    assert extractor.metric("FID") == "FD(efficientnet-lite0)" and extractor.metric("rFID") == "rFD(efficientnet-lite0)"
    assert extractor.metric("IS") == "IS(efficientnet-lite0)"
    features, logits = extractor(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    with pytest.raises(TypeError, match="uint8"):
        extractor(torch.zeros(1, 3, 32, 32))


def test_offline_backbone_recognises_things(extractor):
    from skimage import data

    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375]
    assert extractor(cat)[1].argmax().item() in range(281, 286)  # ImageNet's house cats


def test_wrong_inception_file_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(MissingWeights, match="SHA-256 begins with .* FID's Inception is 6726825d"):
        FeatureExtractor("inception", str(tmp_path / "weights.pth"))
    with pytest.raises(MissingWeights, match="no such file"):
        FeatureExtractor("inception", str(tmp_path / "missing.pth"))


def test_reconstruction_results(tiny_favae, tmp_path, extractor):
    images = ImageDataset(open_source(str(write_images(tmp_path / "images"))), 16)
    result, rows = evaluate_reconstruction(tiny_favae, images, extractor, batch_size=5)
    assert result["num_images"] == 12 and rows.shape == (12, 6)
    assert result["recon"] == pytest.approx((result["low"] + 3 * result["high"]) / 4, rel=1e-5)
    with torch.no_grad():
        expected = [(tiny_favae(i["image"][None]).sample - i["image"]).square().mean() for i in (images[0], images[11])]
    assert torch.allclose(rows[[0, 11], 0].float(), torch.stack(expected), rtol=1e-4)
    assert result["floats_per_image"] == 6 * 4 * 4 and result["params"] == tiny_favae.num_parameters()
    assert result["lpips"] is None and result["rfd"] > 0

    samples = [
        evaluate_reconstruction(tiny_favae, images, extractor, posterior="sample", batch_size=size)[1][:, :5]
        for size in (5, 3)
    ]
    assert torch.allclose(*samples, rtol=1e-3) and not torch.allclose(samples[0], rows[:, :5], rtol=1e-3)

    broken = images.source.files[5]
    broken.write_bytes(broken.read_bytes()[:300])
    without, rest = evaluate_reconstruction(tiny_favae, images, extractor, batch_size=5)
    assert without["num_images"] == 11 and torch.allclose(rest[:, :5], rows[torch.arange(12) != 5, :5], rtol=1e-4)
