#!/usr/bin/env python
"""Images from tar shards against the same images from a folder: opening them, and reading them in random order.

    python -m benchmarks.tar_shards             (a minute on a CPU, 200 MB of temporary files)

Small JPEGs with a class and a caption, files in memory. Opening reads the headers of all images: in a folder there is a
file for each. Also the memory that a row takes once the shards are open. Writes docs/results/tar_shards.json.
"""

import io
import random
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import environment, make_parser, parse_arguments, speedup, time_paired, with_range, write_result
from favae.data.images import Source
from favae.data.sources import open_source


def write_images(folder: Path, count: int, shard_size: int) -> None:
    """The same images in folder/images and folder/shards."""
    (folder / "images/all").mkdir(parents=True)
    (folder / "shards").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for first in range(0, count, shard_size):
        with tarfile.open(folder / f"shards/{first:08}.tar", "w") as tar:
            for index in range(first, min(first + shard_size, count)):
                stream = io.BytesIO()
                Image.fromarray(np.roll(pixels, index, axis=(0, 1))).save(stream, "JPEG")
                (folder / f"images/all/{index:08}.jpg").write_bytes(stream.getvalue())
                for ending, data in (("jpg", stream.getvalue()), ("cls", b"0"), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{index:08}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def read(source: Source, count: int) -> None:
    for index in random.Random(0).choices(range(len(source)), k=count):
        source.read(index)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--shard-size", type=int, default=2_000)
    parser.add_argument("--reads", type=int, default=2_000)
    arguments = parse_arguments(parser, "tar_shards.json", argv, rounds=5)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, arguments.images, arguments.shard_size)
        paths = {kind: str(folder / kind) for kind in ("shards", "images")}
        opening = time_paired(
            {kind: lambda p=path: open_source(p) for kind, path in paths.items()}, rounds=arguments.rounds
        )
        tracemalloc.start()
        shards = open_source(paths["shards"])
        memory, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        sources = {"shards": shards, "images": open_source(paths["images"])}
        reading = time_paired(
            {kind: lambda s=source: read(s, arguments.reads) for kind, source in sources.items()},
            rounds=arguments.rounds,
        )
    result = environment() | {
        "images": arguments.images,
        "opened_per_second": {kind: arguments.images / timing.median for kind, timing in opening.items()},
        "read_per_second": {kind: arguments.reads / timing.median for kind, timing in reading.items()},
        "opening": speedup(opening["shards"].seconds, opening["images"].seconds),
        "reading": speedup(reading["shards"].seconds, reading["images"].seconds),
        "bytes_of_memory_per_image": memory / arguments.images,
    }
    write_result(arguments.output, result)
    print(
        f"opening {with_range(result['opening'], 1)}, reading {with_range(result['reading'])}; "
        f"{result['opened_per_second']['shards']:,.0f} images opened per second, "
        f"{result['bytes_of_memory_per_image']:.0f} bytes of memory each"
    )


if __name__ == "__main__":
    main()
