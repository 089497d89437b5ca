"""The emoji script on a package of a few pictures."""

import importlib
import io
import json
import tarfile

import pytest
from conftest import ROOT
from PIL import Image

from favae.data.sources import open_source

EMOJI = [  # name, short names, category, color
    ("LARGE RED CIRCLE", ["red_circle"], "Symbols", (255, 0, 0, 255)),
    ("LARGE BLUE CIRCLE", ["large_blue_circle"], "Symbols", (0, 0, 255, 255)),
    ("LARGE RED SQUARE", ["large_red_square"], "Symbols", (250, 0, 0, 255)),
    ("LARGE BLUE SQUARE", ["large_blue_square"], "Symbols", (0, 0, 250, 255)),
    ("Norway Flag", ["flag-no"], "Flags", (9, 9, 9, 255)),
    ("Bouvet Island Flag", ["flag-bv"], "Flags", (9, 9, 9, 255)),
    ("WHITE SPACE", [], "Symbols", (0, 0, 0, 0)),
]
HELD_OUT = {"large blue square": "blue square"}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("emoji")


@pytest.fixture
def emoji(module, monkeypatch):
    monkeypatch.setattr(module, "MIN_PICTURES", 6)
    monkeypatch.setattr(module, "HELD_OUT_COMBINATIONS", HELD_OUT)
    return module


def write_archive(file, emoji=EMOJI):
    with tarfile.open(file, "w:gz") as package:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            package.addfile(member, io.BytesIO(data))

        entries = []
        for i, (name, short, category, color) in enumerate(emoji):
            picture = io.BytesIO()
            Image.new("RGBA", (64, 64), color).save(picture, "PNG")
            add(f"img/google/64/{i}.png", picture.getvalue())
            entries.append({"name": name, "short_names": short, "category": category, "image": f"{i}.png"})
        entries.append({"name": "NO PICTURE", "short_names": [], "category": "Symbols", "image": "none.png"})
        add("emoji.json", json.dumps(entries).encode())
    return file


def test_parquet_files(emoji, tmp_path, capsys):
    archive = write_archive(tmp_path / "emoji.tgz")
    emoji.main(["--output", str(tmp_path / "out/emoji.parquet"), "--archive", str(archive)])
    assert "5 emoji in" in capsys.readouterr().out
    train = open_source(str(tmp_path / "out/emoji.parquet"))
    heldout = open_source(str(tmp_path / "out/emoji_heldout.parquet"))
    assert len(train) == 5 and len(heldout) == 1 and train.classes == ["Flags", "Symbols"]
    assert train.captions(0) == ["large red circle", "large red circle, symbols", "red circle"]
    assert heldout.captions(0) == ["large blue square", "large blue square, symbols"]  # each once
    flags = ["norway flag", "norway flag, flags", "flag no", "bouvet island flag", "bouvet island flag, flags"]
    assert train.captions(3) == [*flags, "flag bv"] and train.label(3) == 0  # one picture of two names
    assert train.read(0).getpixel((5, 5)) == (255, 0, 0)
    assert train.read(4).size == (64, 64) and train.read(4).getpixel((5, 5)) == (255, 255, 255)  # over white
    assert set(train.data["split"]) == {"train"} and set(heldout.data["split"]) == {"heldout"}


@pytest.mark.parametrize(
    "held_out, message",
    [
        ({"large green square": "green square"}, "no emoji is called 'large green square'"),
        ({"white space": "white space"}, "no name in training has 'space'"),
        ({"large blue square": "large square"}, "'large red square' is in training"),
    ],
)
def test_what_cannot_be_held_out(emoji, tmp_path, monkeypatch, held_out, message):
    monkeypatch.setattr(emoji, "HELD_OUT_COMBINATIONS", held_out)
    archive = write_archive(tmp_path / "emoji.tgz")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        emoji.main(["--output", str(tmp_path / "emoji.parquet"), "--archive", str(archive)])
    assert not (tmp_path / "emoji.parquet").exists()


def test_archives_that_are_not_the_package(emoji, tmp_path, monkeypatch):
    arguments = ["--output", str(tmp_path / "emoji.parquet"), "--archive"]
    (tmp_path / "text.tgz").write_text("no archive")
    for name in ("text.tgz", "missing.tgz"):
        with pytest.raises(SystemExit, match=f"{name} is not the npm package"):
            emoji.main([*arguments, str(tmp_path / name)])
    monkeypatch.setattr(emoji, "MIN_PICTURES", 100)
    with pytest.raises(SystemExit, match="6 different pictures where .* at least 100"):
        emoji.main([*arguments, str(write_archive(tmp_path / "small.tgz"))])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="npm is not installed; .* --archive"):
        emoji.main(arguments[:2])


def test_combinations_are_words_of_their_names(module):
    """In the real list. The script itself checks, whenever it runs, that their words are in training."""
    assert len(module.HELD_OUT_COMBINATIONS) == 20
    assert all(
        module.words(combination) <= module.words(name) for name, combination in module.HELD_OUT_COMBINATIONS.items()
    )
