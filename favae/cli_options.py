"""Groups of command-line options that several commands share, and what is opened by them.

Nothing heavy is imported before something is opened, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from favae.errors import ConfigError, hint
from favae.ranges import Count, Pixels, Text, Workers, in_range

if TYPE_CHECKING:
    from favae.data.images import Source
    from favae.eval.features import FeatureExtractor
    from favae.losses.perceptual import LPIPS

logger = logging.getLogger(__name__)

text = in_range(Text)


def path(given: str) -> Path:
    """A path; none is empty, which would stand for the current folder."""
    return Path(text(given))


def add_output_option(
    parser: argparse.ArgumentParser, kind: Literal["folder", "file"], *, required: bool = True, **settings: Any
) -> None:
    """Adds `--output`, whose place is looked at before the command begins."""
    settings = {"help": f"a {kind}", **settings}
    parser.add_argument("--output", type=Path, required=required, **settings)
    parser.set_defaults(output_kind=kind)


def add_data_options(
    parser: argparse.ArgumentParser,
    name: str,
    *,
    split: str,
    required: bool = True,
    captions: bool = False,
    also: str = "",
) -> None:
    """Adds the options that name a set of images.

    Args:
        name: the option that takes the images, such as "--data".
        split: the default of `--split`.
        required: whether it must be given.
        captions: whether captions are read.
        also: what else than images may be named, for the help.
    """
    group = parser.add_argument_group("images")
    group.add_argument(
        name,
        dest="data",
        required=required,
        help="photos[:SPLIT], a folder, a .parquet or .tar file, or hf:NAME[:SPLIT]" + also,
    )
    group.add_argument("--split", default=split, help=f"of data sets that have several (default: {split})")
    group.add_argument(
        "--image-column", default="auto", help="of a data set with columns (default: image, or the only one of images)"
    )
    group.add_argument(
        "--label-column",
        default="auto",
        help="likewise (default: label, if there is such a column); none: all images are of one class, also in folders",
    )
    if captions:
        group.add_argument(
            "--caption-column",
            default="auto",
            help="likewise, of strings or lists of them (default: caption, if there is one); none: no captions",
        )
    group.add_argument(
        "--min-size", type=in_range(Count), default=16, help="skip images whose shorter side has fewer pixels"
    )


def open_data(arguments: argparse.Namespace) -> Source:
    """Opens the images that the options of `add_data_options` name."""
    from favae.data.sources import has_columns, open_source

    columns = "--split (or hf:NAME:SPLIT), --image-column and --label-column say what is read"
    with hint(columns) if has_columns(arguments.data) else nullcontext():
        return open_source(
            arguments.data,
            arguments.split,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            caption_column=getattr(arguments, "caption_column", "auto"),
            min_size=arguments.min_size,
        )


def open_other_data(arguments: argparse.Namespace, path: str, split: str) -> Source:
    """Opens a second set of images, whose columns have the same names if it has columns."""
    from favae.data.sources import NONE, has_columns

    columns = ("image_column", "label_column")
    of_folders = {name: "auto" for name in columns if getattr(arguments, name) != NONE}
    changed = {"data": path, "split": split, **({} if has_columns(path) else of_folders)}
    return open_data(argparse.Namespace(**{**vars(arguments), **changed}))


def data_name(arguments: argparse.Namespace) -> str:
    """One string for what the options of `add_data_options` name, for results."""
    from favae.data.sources import has_splits

    path = arguments.data
    return f"{path}:{arguments.split}" if has_splits(path) else path


def add_model_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds `--model`, a list of (name, path)."""
    parser.add_argument(
        "--model",
        action=AppendNamed,
        required=required,
        metavar="[NAME=]PATH",
        help="a saved autoencoder: a folder or a hub name; may be repeated",
    )


class AppendNamed(argparse.Action):
    """A list of (name, path), of [NAME=]PATH. One name may be given to two, as seeds; two paths may not end in it."""

    def __call__(self, parser, namespace, value, option_string=None):
        others = getattr(namespace, self.dest) or []
        try:
            name, path = named_model(value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if path == value and any(name == other and path != its_path for other, its_path in others):
            raise argparse.ArgumentError(self, f"two are called {name!r}; give each a name: NAME={path}")
        setattr(namespace, self.dest, [*others, (name, path)])


def named_model(given: str) -> tuple[str, str]:
    """NAME=PATH, or PATH alone: the name is then its last part, or that before a run's final/ or a pipeline's vae/."""
    name, separator, path = given.partition("=")
    if separator and not Path(given).exists():  # paths like runs/lr=1e-4 are no names
        return text(name), text(path)
    folder = Path(text(given))
    folder = folder.absolute() if folder.exists() else folder  # "final" is in a folder of some name, too
    return (folder.parent.name if folder.name in ("final", "vae") else folder.name), given


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Adds how images are read in batches."""
    group = parser.add_argument_group("loading")
    group.add_argument("--batch-size", type=in_range(Count), default=32, help="(default: 32)")
    group.add_argument(
        "--num-workers", type=in_range(Workers), default=0, help="worker processes that read images (default: 0)"
    )


def add_resolution_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--resolution`, which must be given."""
    parser.add_argument(
        "--resolution", type=in_range(Pixels), required=True, help="height and width of the center crops"
    )


def add_lpips_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--lpips-weights`."""
    parser.add_argument(
        "--lpips-weights",
        metavar="FILE",
        help="weights of VGG16: a file, or 'download'; without this option LPIPS is computed if they are cached",
    )


def open_lpips(weights: str | None) -> LPIPS | None:
    """The LPIPS metric; None, with a warning, if no weights are named and none are cached.

    Args:
        weights: a file, or "download"; None uses VGG16's cached weights.
    """
    from favae.distributed import process_state
    from favae.losses.perceptual import LPIPS, cached_vgg16

    if weights is None and not cached_vgg16():
        logger.warning("no LPIPS: VGG16's weights are not cached; --lpips-weights FILE names them, or 'download'")
        return None
    with hint("--lpips-weights FILE takes a local file"):
        return LPIPS(None if weights == "download" else weights or cached_vgg16()).to(process_state().device)


def add_feature_options(parser: argparse.ArgumentParser, default: Sequence[str] = ("inception",)) -> None:
    """Adds the options that choose feature extractors."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        nargs="+",
        default=list(default),
        metavar="NAME",
        help=f"inception{' (default)' if default else ''}, dinov2, clip, efficientnet-lite0 (needs no network), or any "
        "timm model; with several names, every metric is computed on each of them",
    )
    group.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="local weights of one of --features, in place of a download; may be repeated",
    )


def open_extractors(arguments: argparse.Namespace) -> list[FeatureExtractor]:
    """Opens the extractors that the options of `add_feature_options` name.

    Raises:
        ConfigError: if --weights names no extractor.
        MissingWeights: if weights cannot be loaded.
    """
    from favae.eval.features import FeatureExtractor

    files = {}
    for text in arguments.weights:
        name, separator, file = text.partition("=")
        if not separator or name not in arguments.features:
            raise ConfigError(f"--weights {text}: expected NAME=FILE with a NAME of --features")
        files[name] = file
    with hint("--weights NAME=FILE takes a local file, --features efficientnet-lite0 needs no network"):
        return [FeatureExtractor(name, files.get(name)) for name in dict.fromkeys(arguments.features)]
