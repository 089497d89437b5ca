"""Folders of image files."""

import logging
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from PIL import Image

from favae.data.captions import read_caption_lines
from favae.data.decoding import UnusableImage, image_extensions, read_image, stored_size
from favae.data.images import MIN_SIZE, ImageIdentity
from favae.errors import DataError
from favae.files import LOCK_FILE, SETTINGS_FILE

logger = logging.getLogger(__name__)

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "heldout"}  # names of folders
NO_LABELS = "the label column 'none' takes all images as one class"  # the end of messages
NAMES_SHOWN = 3  # in messages that count files


class FolderSource:
    """Every image below a folder. Its first folder level is the class, if it has one, as in torchvision's ImageFolder.

    The captions of `name.png` are the lines of `name.txt` beside it. Links are followed. All headers are read when the
    source is opened: a file that is no image, or is too small, is left out with a warning that names it. Other files,
    names that begin with "." and links that lead nowhere are counted in a warning.

    Args:
        path: of the folder.
        min_size: pixels that the shorter side of an image must have.
        labels: whether the first folder level is the class; without, all images are of one.
        captions: whether captions are read.

    Attributes:
        files: those that are used. sizes: width and height of each as it is stored, before it is turned upright.
        classes: names of the class folders, sorted. A folder whose images all are unusable is still a class.

    Raises:
        DataError: if the folder does not exist, if it has no usable image, if only some images are in class folders, or
            if these folders are the splits of a data set.
    """

    def __init__(self, path: str | Path, min_size: int = MIN_SIZE, *, labels: bool = True, captions: bool = True):
        check_name(path)
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{path} is a file, not a folder" if self.path.exists() else f"{path}: no such folder")
        scan = FolderScan(self.path)

        # Files whose headers can be read.
        self.files: list[Path] = []
        self.sizes: list[tuple[int, int]] = []
        for file in scan.images:
            try:
                size = stored_size(file)
                check_size(size, min_size)
                self.sizes.append(size)
                self.files.append(file)
            except UnusableImage as error:
                logger.warning("skipped %s: %s", printable(str(file)), error)
        skipped = len(scan.images) - len(self.files)
        if skipped:
            logger.warning("skipped %d of %d images in %s", skipped, len(scan.images), path)
        ignored = scan.ignored_text()
        if not self.files:
            found = f"{len(scan.images)} image files found, {skipped} skipped" + (f"; {ignored}" if ignored else "")
            raise DataError(f"{path}: no usable image ({found}); archives must be unpacked")
        if ignored:
            logger.warning("%s: left out %s", path, ignored)

        self.classes, self._labels = ["image"], [0] * len(self.files)
        if labels:
            self._read_labels(scan)
        self._reads_captions = captions
        self._without_captions: set[int] = set()

    def _read_labels(self, scan: "FolderScan") -> None:
        """Names of the classes, and the class of each file."""
        classes = sorted(scan.depths)
        if not classes:
            return
        loose = next((file.name for file in self.files if file.parent == self.path), None)
        if loose is not None:
            raise DataError(
                f"{self.path}: some images are in class folders and some are not, such as {printable(classes[0])}/ and "
                f"{printable(loose)}; {NO_LABELS}"
            )
        names = {name.lower() for name in classes}
        if names <= SPLITS or (names & {"train", "training"} and len(names & SPLITS) > 1):
            raise DataError(
                f"{self.path} holds the splits {', '.join(sorted(names & SPLITS))}, which are no classes; name one of "
                f"them, such as {self.path / classes[0]}, or else {NO_LABELS}"
            )
        uneven = [name for name, depths in scan.depths.items() if len(depths) > 1]
        if uneven:
            logger.warning("%s: images at several depths below the class folders %s", self.path, shown(uneven))
        index = {name: i for i, name in enumerate(classes)}
        first = len(self.path.parts)
        self.classes, self._labels = list(map(printable, classes)), [index[file.parts[first]] for file in self.files]
        empty = set(range(len(classes))) - set(self._labels)
        if empty:
            logger.warning("%s: classes without a usable image: %s", self.path, shown([classes[i] for i in empty]))

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return printable(str(self.files[index]))

    def identity(self, index: int) -> ImageIdentity:
        file = self.files[index]
        stat = file.stat()
        return ImageIdentity(printable(file.relative_to(self.path).as_posix()), stat.st_size, stat.st_mtime_ns)

    def checksum(self, index: int) -> int:
        return zlib.crc32(self.files[index].read_bytes())

    def read(self, index: int, channels: int = 3) -> Image.Image:
        return read_image(self.files[index], channels)

    @property
    def has_captions(self) -> bool:
        return self._reads_captions and any(file.with_suffix(".txt").is_file() for file in self.files)

    def captions(self, index: int) -> list[str]:
        """None, with a warning, if the file with the captions is not UTF-8."""
        if not self._reads_captions:
            return []
        try:
            return read_caption_lines(self.files[index].with_suffix(".txt"))
        except DataError as error:
            self._without_captions.add(index)
            logger.warning("no captions of %s: %s (%d so far)", self.name(index), error, len(self._without_captions))
            return []


def check_name(path: str | Path) -> None:
    """Raises `DataError` for a name that a shell variable without a value leaves: it would be the current folder."""
    if not str(path).strip():
        raise DataError("the name of the images is empty; '.' is the current folder")


def check_size(size: tuple[int, int], min_size: int) -> None:
    """Raises `UnusableImage` if an image is smaller than `min_size` pixels."""
    if min(size) < min_size:
        raise UnusableImage(f"{size[0]} x {size[1]} pixels, but the shorter side must have at least {min_size}")


class FolderScan:
    """What there is below a folder, by the names of the files.

    Attributes:
        images: files that are called images, sorted.
        depths: the numbers of folders above images, by the first of these folders.
        suffixes: how often other files end in what.
    """

    def __init__(self, path: Path):
        self.path = path
        self.images: list[Path] = []
        self.depths: defaultdict[str, set[int]] = defaultdict(set)
        self.suffixes: Counter[str] = Counter()
        self._ignored: defaultdict[str, list[str]] = defaultdict(list)  # names, by what is wrong with them
        self._visit(path, (), ())
        self.images.sort()

    def ignored_text(self) -> str:
        """What is left out, counted, with some of the names; "" if there is nothing."""
        parts = [f"{len(names)} {kind} ({shown(names)})" for kind, names in self._ignored.items()]
        if self.suffixes:
            endings = [f"{count} {suffix or 'without an ending'}" for suffix, count in self.suffixes.most_common()]
            parts.append(f"{self.suffixes.total()} files that are no images ({shown(endings)})")
        return ", ".join(parts)

    def _visit(self, folder: Path, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
        """Visits a folder.

        Args:
            parts: the folders between the one that is scanned and this one, with it.
            above: device and inode of the folders that were entered on the way here.
        """
        stat = folder.stat()
        above = (*above, (stat.st_dev, stat.st_ino))
        stems, texts = set(), []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = "/".join((*parts, entry.name))
            if entry.name in (LOCK_FILE, SETTINGS_FILE):
                continue  # of a folder of samples
            if entry.name.startswith("."):
                self._ignored["names that begin with '.'"].append(name)
                continue
            if _is_folder(entry):
                stat = entry.stat()
                if (stat.st_dev, stat.st_ino) in above:
                    self._ignored["links to a folder that they are in"].append(name)
                else:
                    self._visit(Path(entry.path), (*parts, entry.name), above)
            elif not os.path.isfile(entry.path):
                self._ignored["links that lead nowhere" if entry.is_symlink() else "special files"].append(name)
            elif (ending := ending_of(entry.name)) in image_extensions():
                self.images.append(Path(entry.path))
                if parts:
                    self.depths[parts[0]].add(len(parts))
                stems.add(os.path.splitext(entry.name)[0])
            elif ending == ".txt":
                texts.append(entry.name)
            else:
                self.suffixes[ending] += 1
        if len(parts) == 1 and parts[0] not in self.depths:
            self._ignored["folders without an image"].append(parts[0])
        lonely = ["/".join((*parts, text)) for text in texts if text.removesuffix(".txt") not in stems]
        if lonely:
            self._ignored["texts without an image of their name"] += lonely


def walk(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `path` on, with the names of its files, sorted; without what is hidden.

    Links are followed, but to a folder that they are in.
    """
    above: dict[str, frozenset[str]] = {str(path): frozenset()}
    for folder, folders, files in os.walk(path, followlinks=True):
        entered = above.pop(folder) | {os.path.realpath(folder)}
        paths = {name: os.path.join(folder, name) for name in sorted(folders) if not name.startswith(".")}
        folders[:] = (name for name, below in paths.items() if os.path.realpath(below) not in entered)
        above |= {paths[name]: entered for name in folders}
        yield folder, sorted(name for name in files if not name.startswith("."))


def ending_of(name: str) -> str:
    """Of a file, in lower case and with its dot."""
    return os.path.splitext(name)[1].lower()


def holds_only(folder: str | Path, ending: str, others: Set[str]) -> bool:
    """Whether there are files of this ending in a folder or below it, and none of the others."""
    found = False
    for _, files in walk(folder):
        endings = set(map(ending_of, files))
        if endings & others:
            return False
        found |= ending in endings
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link may lead to itself


def printable(name: str) -> str:
    """The name of a file as text that any file or terminal takes: names need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def shown(names: Sequence[str]) -> str:
    """Some names, in a message that counts them."""
    return ", ".join(map(printable, names[:NAMES_SHOWN])) + (", ..." if len(names) > NAMES_SHOWN else "")
