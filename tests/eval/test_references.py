"""References of every kind, and what is measured of images against them."""

import numpy as np
import pytest
import torch
from conftest import write_images

from favae.data.images import ImageDataset
from favae.data.sources import open_source
from favae.errors import DataError
from favae.eval.extraction import ImageStatistics
from favae.eval.features import FeatureExtractor
from favae.eval.frechet import feature_statistics
from favae.eval.generation import generation_metrics, measure_samples
from favae.eval.image_sets import CroppedImages, open_samples
from favae.eval.references import Reference, save_statistics


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor("efficientnet-lite0")


def test_references_agree_whatever_they_are_read_from(extractor, tmp_path):
    source = open_source(str(write_images(tmp_path / "images", size=(16, 16))))
    images = CroppedImages(ImageDataset(source, 16))

    def reference(name: str, size: int = 16, by=extractor):
        return Reference(str(tmp_path / name), [by], lambda: source).statistics((size, size))

    (direct,) = reference("images")
    assert direct.count == 12 and direct.features.shape == (12, 1280) and direct.spatial_mean is None
    save_statistics(tmp_path / "r.safetensors", [direct], {"data": "x", "resolution": 16, "crop": "center"})
    (saved,) = reference("r.safetensors")
    assert saved.hash == direct.hash and np.array_equal(saved.covariance, direct.covariance)
    np.savez(tmp_path / "r.npz", arr_0=np.stack([images[i]["image"].permute(1, 2, 0).numpy() for i in range(12)]))
    (packed,) = reference("r.npz")
    assert packed.hash == direct.hash and np.allclose(packed.mean, direct.mean, atol=1e-5)

    with pytest.raises(DataError, match="r.safetensors .* 16 x 16 .* 32 x 32"):
        reference("r.safetensors", 32)
    with pytest.raises(DataError, match="efficientnet-lite0, not of inception"):
        reference("r.safetensors", by=Named())
    with pytest.raises(DataError, match="r.npz .* 16 x 16 .* 32 x 32"):
        reference("r.npz", 32)
    other = Named()
    other.name = extractor.name
    with pytest.raises(DataError, match="r.safetensors was made with other weights of efficientnet-lite0"):
        reference("r.safetensors", by=other)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "r.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="torn.safetensors is damaged"):
        reference("torn.safetensors")


class Named:
    """An extractor of 4 simple features under Inception's name."""

    name, hash = "inception", "0"

    def __call__(self, images):
        pooled = images.float().mean((2, 3)) / 255
        features = torch.cat([pooled, pooled.square().sum(dim=1, keepdim=True)], dim=1)
        return {"features": features, "logits": features, "spatial": features[:, :2]}


def test_adm_statistics_are_the_reference_and_their_images_only_for_precision(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(30, 8, 8, 3), dtype=np.uint8)
    statistics = {"mu": np.full(4, 2.0), "sigma": np.eye(4), "mu_s": np.full(2, 3.0), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "adm.npz", arr_0=images, **statistics)
    np.savez(tmp_path / "samples.npz", arr_0=images[:20])
    (reference,) = Reference(str(tmp_path / "adm.npz"), [Named()]).statistics((8, 8))
    assert reference.count is None and np.array_equal(reference.mean, statistics["mu"])
    assert np.array_equal(reference.spatial_covariance, np.eye(2)) and reference.features.shape == (30, 4)
    assert reference.differences is not None
    metrics, count = measure_samples(open_samples(tmp_path / "samples.npz"), [reference], [Named()])
    assert count == 20 and set(metrics) == {
        "FID", "sFID", "IS", "IS_std", "precision", "recall", "KID", "KID_std", "MIND", "MIND_floor"
    }  # fmt: skip
    assert metrics["precision"] == 1 and metrics["FID"] > 4 * (2 - 1) ** 2 and metrics["sFID"] > 2 * (3 - 1) ** 2

    np.savez(tmp_path / "statistics.npz", **statistics)  # without images
    (reference,) = Reference(str(tmp_path / "statistics.npz"), [Named()]).statistics((8, 8))
    metrics, _ = measure_samples(open_samples(tmp_path / "samples.npz"), [reference], [Named()])
    assert metrics["FID"] > 0 and metrics["precision"] is None and metrics["KID"] is None


def test_too_few_images_leave_out_a_measure_and_keep_the_rest(caplog):
    rng = np.random.default_rng(0)

    def statistics(count: int, logits=None) -> ImageStatistics:
        rows = rng.normal(size=(count, 4))
        return ImageStatistics("inception", "", count, *feature_statistics(rows), features=rows, logits=logits)

    metrics = generation_metrics(statistics(3, rng.normal(size=(3, 5))), statistics(50))
    assert metrics["FID"] > 0 and metrics["IS"] >= 1 and metrics["KID"] is not None
    assert metrics["precision"] is None and "precision, recall" in caplog.text
    assert "sFID" not in metrics and "IS" not in generation_metrics(statistics(50), statistics(50))
    single = ImageStatistics("inception", "", 1, None, None, features=np.zeros((1, 4)))
    names = ("FID", "precision", "recall", "KID", "KID_std", "MIND", "MIND_floor")
    assert generation_metrics(single, statistics(50)) == dict.fromkeys(names)


def test_real_images_set_the_scale(tmp_path):
    """FDr is 1 for the validation images themselves, with one extractor or the mean of two; patches leave seams."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(3, 30, 16, 16, 3), dtype=np.uint8)
    images[2] = images[2] // 4 + images[2, :, :2, :2].repeat(8, 1).repeat(8, 2) // 2  # patches of 8 x 8
    for name, pixels in zip(("train", "validation", "fake"), images):
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
    extractors = [Named(), Named()]
    extractors[1].name = "other"
    references, validation = (
        Reference(str(tmp_path / f"{name}.npz"), extractors).statistics((16, 16)) for name in ("train", "validation")
    )

    def measure(name):
        samples = open_samples(tmp_path / f"{name}.npz")
        return measure_samples(samples, references, extractors, validation=validation, patch_size=8)[0]

    same, fake = measure("validation"), measure("fake")
    assert same["FDr"] == same["FDr(other)"] == same["FDr^2"] == pytest.approx(1)
    assert fake["FDr^2"] > 2 and fake["MIND"] > 2 * fake["MIND_floor"] > 0
    assert same["seams"] == pytest.approx(1, abs=0.1) and fake["seams"] > 1.5
    samples = open_samples(tmp_path / "fake.npz")
    itself = measure_samples(samples, references, extractors, validation=references)[0]  # their distance is rounding
    assert itself["FDr"] is None
    np.savez(tmp_path / "few.npz", arr_0=images[2, :20])  # fewer images are further from anything
    few = measure_samples(open_samples(tmp_path / "few.npz"), references, extractors, validation=validation)[0]
    assert few["FDr"] is None and few["FID"] > 0
    assert same["KID_std"] is None and few["KID_std"] > 0  # a spread of subsets, of which there is one
