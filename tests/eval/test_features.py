"""Extractors, what their numbers may be called, and rows of several processes."""

import numpy as np
import pytest
import timm
import torch
from conftest import write_images

from favae.data.images import ImageDataset, to_uint8
from favae.data.sources import open_source
from favae.distributed import gather_rows, image_generator
from favae.errors import MissingWeights
from favae.eval import features as module
from favae.eval.extraction import PairedDistances, image_statistics
from favae.eval.features import FeatureExtractor, metric_name
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.image_sets import CroppedImages


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor("efficientnet-lite0")


def test_seeds_belong_to_images():
    draws = {torch.rand(1, generator=image_generator(seed, index)).item() for seed in range(3) for index in range(50)}
    assert len(draws) == 150


def test_numbers_on_other_features_are_not_called_fid(extractor):
    assert extractor.metric("FID") == "FD(efficientnet-lite0)" and extractor.metric("rFID") == "rFD(efficientnet-lite0)"
    assert extractor.metric("IS") == "IS(efficientnet-lite0)" and extractor.metric("KID") == "KD(efficientnet-lite0)"
    assert metric_name("FID", "dinov2") == "FD-DINOv2" and metric_name("FID", "inception") == "FID"
    found = extractor(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert found["features"].shape == (2, 1280) and found["logits"].shape == (2, 1000) and "spatial" not in found
    with pytest.raises(TypeError, match="uint8"):
        extractor(torch.zeros(1, 3, 32, 32))


def test_offline_backbone_recognises_things(extractor, monkeypatch):
    from skimage import data

    monkeypatch.setattr(module, "FEATURE_SIZE", 224)  # as outside the tests
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375]
    assert extractor(cat)["logits"][0].argmax().item() in range(281, 286)  # ImageNet's house cats


@pytest.mark.parametrize("enabled", [True, False])
def test_features_are_computed_with_cudnn_where_it_is_on(extractor, monkeypatch, enabled):
    found, pooled = [], extractor.model.pooled

    def recorded(*words):
        found.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return pooled(*words)

    monkeypatch.setattr(extractor.model, "pooled", recorded)
    with torch.backends.cudnn.flags(enabled=enabled):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert found == [(enabled, False)]


def test_wrong_inception_file_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(MissingWeights, match="SHA-256 of .* begins with .*, that of FID's Inception with 6726825d"):
        FeatureExtractor("inception", str(tmp_path / "weights.pth"))
    with pytest.raises(MissingWeights, match="no such file"):
        FeatureExtractor("inception", str(tmp_path / "missing.pth"))


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """The real architecture with random weights, through the real loading code."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    state = Untrained("x", ["2048"], feature_extractor_weights_path=str(file)).state_dict()
    torch.save(state, file)
    return file


def test_inception_gives_pool_logits_and_spatial_features(random_inception, monkeypatch):
    import hashlib

    digest = hashlib.sha256(random_inception.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "INCEPTION_HASH", digest[:8])
    extractor = FeatureExtractor("inception", str(random_inception))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    found = extractor(images)
    assert {name: value.shape[1] for name, value in found.items()} == {
        "features": 2048,
        "logits": 1008,
        "spatial": 17 * 17 * 7,
    }
    outputs = []
    extractor.model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    extractor(images)
    assert torch.equal(found["spatial"][1, :7], outputs[0][1, :7, 0, 0])  # channels of the first position come first


def test_a_damaged_download_of_inception_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / module.INCEPTION_FILE).write_bytes(b"something else")
    with pytest.raises(MissingWeights, match="SHA-256"):
        FeatureExtractor("inception")


def test_clip_gives_its_projected_embeddings(tmp_path, monkeypatch):
    """With a small model of the same library in its place; the real one has 1.2 GB."""
    assert timm.get_pretrained_cfg(module.CLIP_MODEL).input_size[-1] == module.CLIP_SIZE
    monkeypatch.setattr(module, "CLIP_MODEL", "vit_tiny_patch16_224")
    monkeypatch.setattr(module, "CLIP_SIZE", 32)
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pth")
    extractor = FeatureExtractor("clip", str(tmp_path / "clip.pth"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = extractor(images)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert list(found) == ["features"]
    assert torch.allclose(found["features"], model((images / 255 - mean) / std), atol=1e-4)


def test_statistics_of_a_set_keep_its_order_and_digest(extractor, tmp_path):
    folder = write_images(tmp_path / "images")
    images = CroppedImages(ImageDataset(open_source(str(folder)), 16))
    (whole,) = image_statistics(images, [extractor], batch_size=5, logits=True)
    (other,) = image_statistics(images, [extractor], batch_size=3, num_workers=1)
    assert whole.features.shape == (12, 1280) and whole.logits.shape == (12, 1000) and whole.hash == other.hash
    assert np.allclose(whole.features, other.features, atol=1e-4) and other.logits is None
    found = extractor(images[7]["image"][None])
    assert np.allclose(whole.features[7], found["features"][0], atol=1e-4)
    assert np.allclose(whole.logits[7], found["logits"][0], atol=1e-3)
    mean, covariance = feature_statistics(whole.features)
    assert np.allclose(whole.mean, mean) and np.allclose(whole.covariance, covariance)

    (some,) = image_statistics(images, [extractor], keep=4)  # always the same four, in their order
    assert some.features.shape == (4, 1280) and np.allclose(some.covariance, covariance, atol=1e-6)
    places = [int(np.abs(whole.features - row).sum(axis=1).argmin()) for row in some.features]
    assert places == sorted(set(places)) and np.allclose(some.features, whole.features[places], atol=1e-4)

    broken = images.images.source.files[5]
    broken.write_bytes(broken.read_bytes()[:300])
    (rest,) = image_statistics(images, [extractor], batch_size=5)
    assert rest.count == 11 and rest.hash != whole.hash
    assert np.allclose(rest.features, np.delete(whole.features, 5, axis=0), atol=1e-4)


def test_distances_of_pairs_are_those_of_the_sets(extractor):
    pictures = torch.rand(2, 9, 3, 16, 16) * 2 - 1
    distances = PairedDistances([extractor])
    for batch in (pictures[:, :4], pictures[:, 4:]):
        distances.update(*batch)
    moments = (feature_statistics(extractor(to_uint8(each))["features"].numpy()) for each in pictures)
    expected = frechet_distance(*next(moments), *next(moments))
    assert distances.finish("rFID") == {"rFD(efficientnet-lite0)": pytest.approx(expected, rel=1e-6)}
    single = PairedDistances([extractor])
    single.update(*pictures[:, :1])
    assert list(single.finish("rFID").values()) == [None]


def test_rows_of_one_process_are_not_copied():
    rows = torch.rand(3, 2)
    assert gather_rows(rows, torch.tensor([0, 2, 3]), 5).data_ptr() == rows.data_ptr()  # images 1 and 4: unreadable
    assert torch.equal(gather_rows(rows, torch.tensor([2, 0, 3]), 5), rows[[1, 0, 2]])
