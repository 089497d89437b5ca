"""How sizes of images, latents and layers depend on each other; shared by all autoencoders."""

from collections.abc import Sequence

from torch import Tensor


def compression_ratio(num_levels: int) -> int:
    """Pixels per latent along each side of a network of so many levels, which halves the size between each two."""
    return 2 ** (num_levels - 1)


def check_image_size(images: Tensor, ratio: int) -> None:
    """Raises ValueError if the height or width of the images is not a multiple of the compression ratio.

    diffusers' encoders crop such images silently.
    """
    height, width = images.shape[-2:]
    if height % ratio or width % ratio:
        raise ValueError(f"height and width must be multiples of {ratio}, got {height}x{width}")


def check_widths(norm_num_groups: int, **widths: Sequence[int]) -> None:
    """Raises ValueError for widths, given by the names of their arguments, that cannot be normalized in groups."""
    for name, values in widths.items():
        if any(value % norm_num_groups for value in values):
            raise ValueError(f"{name} must be multiples of norm_num_groups = {norm_num_groups}, got {tuple(values)}")
