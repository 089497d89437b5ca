"""LPIPS on VGG16: the network of torchmetrics, with weights that may come from a local file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from favae.errors import MissingWeights
from favae.precision import no_autocast

VGG16 = "vgg16-397923af.pth"  # torchvision's file name


def cached_vgg16() -> str | None:
    """The file that torchvision has downloaded before, if it has."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / VGG16
    return str(file) if file.is_file() else None


class LPIPS(nn.Module):
    """Learned perceptual distance; frozen, but gradients pass to its inputs.

    Args:
        weights: a local file with torchvision's VGG16 (its linear heads are inside torchmetrics); None downloads it.
        remedy: what a user can do without a network, for the error message.

    Raises:
        MissingWeights: if VGG16 can neither be read nor downloaded.
    Source: Zhang et al., CVPR 2018.
    """

    def __init__(self, weights: str | None = None, remedy: str = "weights=FILE takes a local file"):
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        if weights is not None and not Path(weights).is_file():
            raise MissingWeights(f"weights of LPIPS: no such file: {weights}")
        try:
            self.net = _LPIPS(pretrained=True, net="vgg", pnet_rand=weights is not None)
        except (OSError, RuntimeError) as error:
            raise MissingWeights(
                f"the VGG16 weights of LPIPS ({VGG16}, torchvision) could not be downloaded "
                f"({type(error).__name__}); {remedy}"
            ) from error
        if weights is not None:
            self._load(torch.load(weights, map_location="cpu", weights_only=True))
        self.requires_grad_(False)
        super().train(False)

    def _load(self, state: dict[str, Tensor]) -> None:
        """torchvision names layer n `features.n`; torchmetrics sorts the same layers into five slices."""
        names = [name for name, _ in self.net.net.named_parameters()]  # slice1.0.weight, slice1.0.bias, ...
        self.net.net.load_state_dict({name: state["features." + name.split(".", 1)[1]] for name in names})

    def train(self, mode: bool = True):
        return self  # its heads have dropout, which must stay off

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1] -> (B,), float32."""
        with no_autocast(first.device):
            return self.net(first.float(), second.float()).flatten()
