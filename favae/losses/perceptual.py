"""LPIPS on VGG16: the network of torchmetrics, with weights that may come from a local file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from favae.channels import in_color
from favae.errors import MissingWeights
from favae.files import READ_ERRORS
from favae.precision import no_autocast

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's name
SMALLEST_PERCEPTUAL = 16  # pixels, of images that VGG16 halves four times


def cached_vgg16() -> str | None:
    """The file that torchvision downloaded earlier, if there is one."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    return str(file) if file.is_file() else None


class LPIPS(nn.Module):
    """Learned perceptual distance. It is frozen, but gradients pass to its inputs.

    Args:
        weights: a local file with torchvision's VGG16; None downloads it. The linear layers on top of VGG16 are part
            of torchmetrics.

    Raises:
        MissingWeights: if VGG16 can neither be read nor downloaded.
    Source: Zhang et al., CVPR 2018.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        # The public metric of torchmetrics cannot replace this private class: it refuses images outside [-1, 1], which
        # reconstructions in training are, and it always downloads VGG16.
        from torchmetrics.functional.image.lpips import _LPIPS

        if weights is not None and not Path(weights).is_file():
            raise MissingWeights(f"weights of LPIPS: no such file: {weights}")
        try:
            self.net = _LPIPS(pretrained=True, net="vgg", pnet_rand=weights is not None)
        except (OSError, RuntimeError) as error:
            raise MissingWeights(
                f"the VGG16 weights of LPIPS ({VGG16_FILE}, torchvision) could not be downloaded "
                f"({type(error).__name__})"
            ) from error
        if weights is not None:
            try:
                self._load_vgg16(torch.load(weights, map_location="cpu", weights_only=True))
            except READ_ERRORS as error:
                raise MissingWeights(f"weights of LPIPS: {weights} is damaged, or not torchvision's VGG16") from error
        self.requires_grad_(False)
        super().train(False)

    def _load_vgg16(self, state: dict[str, Tensor]) -> None:
        """torchvision calls layer n `features.n`; torchmetrics has the same layers in five slices, `slice1.n`."""
        names = [name for name, _ in self.net.net.named_parameters()]
        self.net.net.load_state_dict({name: state["features." + name.split(".", 1)[1]] for name in names})

    def train(self, mode: bool = True):
        """Does nothing: the dropout of the linear layers stays off."""
        return self

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches of images (B, C, H, W) around [-1, 1], seen `in_color` -> distances (B,), float32."""
        with no_autocast(first.device):
            return self.net(in_color(first.float()), in_color(second.float())).flatten()
