"""Images beside their reconstructions."""

import argparse
from pathlib import Path

import pytest
import torch
from conftest import command, command_error, write_images
from PIL import Image

from favae.autoencoders import reconstruct
from favae.cli_options import add_model_option, named_model
from favae.eval.results import number_duplicates
from favae.eval.side_by_side import Comparison, compare_on_images, find_images, open_image, save_side_by_side


@pytest.fixture
def models(tiny_kl, tiny_favae, tmp_path) -> list[tuple[str, str]]:
    tiny_kl.save_pretrained(tmp_path / "kl/final")
    tiny_favae.save_pretrained(tmp_path / "favae/final")
    return [("kl", str(tmp_path / "kl/final")), ("favae", str(tmp_path / "favae/final"))]


def test_the_command_prints_psnr_and_writes_a_picture(models, tmp_path, capsys):
    folder = write_images(tmp_path / "images", classes=1, per_class=2, size=(27, 20))
    single = tmp_path / "single.png"
    Image.new("RGB", (16, 24), "orange").save(single)
    output = tmp_path / "new/out.png"
    command("reconstruct", folder, single, *(f"--model={path}" for _, path in models), "--output", output)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["kl", "favae"]  # the names of the runs
    assert [line.split()[0] for line in lines[1:4]] == ["0.png", "1.png", "single.png"]
    assert "24 x 20" in lines[1] and "cropped from 27 x 20" in lines[1] and "cropped" not in lines[3]
    with Image.open(output) as picture:
        assert picture.width > 3 * 256 and picture.height > 9 * 256  # three rows for each image, large enough to see


def test_a_reconstruction_that_is_not_finite_is_one_line(tiny_kl, tmp_path):
    with torch.no_grad():
        tiny_kl.decoder.conv_out.bias.fill_(torch.inf)
    tiny_kl.save_pretrained(tmp_path / "broken")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    output = ("--output", tmp_path / "out.png")
    message = command_error("reconstruct", tmp_path / "image.png", f"--model={tmp_path / 'broken'}", *output)
    assert "the reconstruction of broken is not finite" in message and not (tmp_path / "out.png").exists()


def test_reconstructions_are_those_of_the_model(models, tiny_kl, tmp_path):
    (file,) = find_images([write_images(tmp_path / "images", classes=1, per_class=1, size=(24, 20))])
    (found,) = compare_on_images([file], models)
    with torch.no_grad():
        expected = reconstruct(tiny_kl, found.original[None])[0].clamp(-1, 1)
    assert torch.allclose(found.reconstructions["kl"], expected, atol=1e-5) and found.note == ""
    error = (found.original - expected).mul(127.5).square().mean()
    assert found.psnr["kl"] == pytest.approx(float(10 * (255**2 / error).log10()), abs=0.1)
    (cropped,) = compare_on_images([file], models, resolution=8)
    assert cropped.original.shape == (3, 8, 8) and "24 x 20" in cropped.note


def test_images_are_cropped_in_the_middle(tmp_path):
    image = Image.new("RGB", (19, 8), "black")
    image.paste("white", (1, 0, 17, 8))
    image.save(tmp_path / "x.png")
    pixels, note = open_image(tmp_path / "x.png", 8, None)
    assert pixels.shape == (3, 8, 16) and bool((pixels == 1).all()) and "19 x 8" in note


@pytest.mark.parametrize("size", [(2000, 500), (3, 5)])
def test_pictures_of_any_size(tmp_path, size):
    original = torch.rand(3, size[1], size[0]) * 2 - 1
    noisy = (original + 0.1 * torch.randn_like(original)).clamp(-1, 1)
    comparison = Comparison("x", original, {"noisy": noisy, "same": original}, {"noisy": 20.0, "same": 100.0}, "")
    save_side_by_side(tmp_path / "x.png", [comparison])
    with Image.open(tmp_path / "x.png") as picture:
        assert 3 * 180 < picture.width < 3 * 700 and picture.height < 3 * 700


def test_what_is_no_image_is_named(models, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (3, 30)).save(tmp_path / "narrow.png")
    arguments = ("--model", models[0][1], "--output", tmp_path / "out.png")
    for name in ("missing.png", "text.png", "narrow.png"):
        assert name in command_error("reconstruct", tmp_path / name, *arguments)
    assert "must end in .png" in command_error("reconstruct", "a.png", "--model=m", "--output", tmp_path / "x.jpg")
    assert "no/model" in command_error("reconstruct", tmp_path / "narrow.png", "--model=no/model", "--output", "x.png")


def test_names_of_models(tmp_path, monkeypatch):
    assert named_model("a=b/c") == ("a", "b/c") and named_model("org/name") == ("name", "org/name")
    assert named_model("runs/favae/final") == ("favae", "runs/favae/final")
    assert named_model("pipeline/vae") == ("pipeline", "pipeline/vae")
    (tmp_path / "favae/final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "favae")
    assert named_model("final") == ("favae", "final")
    Path("lr=0.1").mkdir()
    assert named_model("lr=0.1") == ("lr=0.1", "lr=0.1") and named_model("a=lr=0.1") == ("a", "lr=0.1")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_model_option(parser)
    seeds = ["--model", "ours=runs/a/final", "--model", "ours=runs/b/final", "--model", "runs/c"]
    assert [name for name, _ in parser.parse_args(seeds).model] == ["ours", "ours", "c"]
    with pytest.raises(argparse.ArgumentError, match="two are called 'ft'"):
        parser.parse_args(["--model", "one/ft", "--model", "other/ft"])
    assert number_duplicates(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert number_duplicates(["a", "a", "a (2)"]) == ["a", "a (2)", "a (2) (2)"]
