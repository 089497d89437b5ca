"""The whole chain once, tiny, as the Makefile runs it; and the files a demo leaves."""

import json
from unittest import mock

from conftest import command, command_error, tiny_generator_recipe, tiny_tokenizer_recipe, write_images
from matplotlib.figure import Figure

from favae.eval import report
from favae.eval.report import verdict

PLAIN = """
model: {name: AutoencoderKL, down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D],
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D], block_out_channels: [8, 8, 16],
  norm_num_groups: 4, latent_channels: 6, sample_size: 16}
"""


def test_curves_of_all_runs():
    with mock.patch.object(Figure, "savefig", autospec=True) as saved:
        report._curves({f"run{i}": [{"step": 1, "kl": 0.0}, {"step": 2, "kl": 1.0}] for i in range(6)}, ("kl",))
    (axis,) = saved.call_args.args[0].axes
    assert [line.get_label() for line in axis.lines] == [f"run{i}" for i in range(6)]


def test_the_whole_chain(tmp_path, capsys):
    demo = tmp_path / "demo"
    images = write_images(tmp_path / "images")
    ours = tiny_tokenizer_recipe(tmp_path, images)
    plain = tmp_path / "plain.yaml"
    plain.write_text(PLAIN + ours.read_text()[ours.read_text().index("data:") :])
    alignment = ["loss.alignment.weight=0.1", "loss.alignment.backbone=efficientnet-lite0"]  # adaptive
    command("train-tokenizer", ours, f"output={demo / 'favae'}", *alignment)
    command("report", demo)  # there is something to see after the first step
    assert (demo / "report.html").read_text().count("data:image/png;base64,") == 2
    command("train-tokenizer", plain, f"output={demo / 'vavae'}", *alignment)
    final = demo / "favae/final"
    cache = ("--data", images, "--resolution", "16", "--output", demo / "latents")
    command("cache-latents", "--tokenizer", final, *cache)
    recipe = tiny_generator_recipe(tmp_path, demo / "latents", final)
    command("train-generator", recipe, f"output={demo / 'generator'}")
    models = ("--model", f"vavae={demo / 'vavae/final'}", "--model", f"favae={final}")
    features = ("--features", "efficientnet-lite0")
    arguments = ("--data", images, "--resolution", "16", *features, "--output", demo / "reconstruction")
    command("evaluate", "reconstruction", *models, *arguments)
    printed = capsys.readouterr().out
    assert "rFD(efficientnet-lite0)" in printed and "FID" not in printed
    arguments = ("--reference", images, "--num-images", "9", "--num-inference-steps", "2", *features)
    pipeline = ("--pipeline", demo / "generator/final")
    command("evaluate", "generation", *pipeline, *arguments, "--output", demo / "generation")
    printed = capsys.readouterr().out
    assert "FD(efficientnet-lite0)" in printed and "FID" not in printed
    command("report", demo)

    metrics = json.loads((demo / "metrics.json").read_text())
    rows = {row["model"]: row for row in metrics["evaluations"]["reconstruction"]["rows"]}
    assert set(rows) == {"favae", "vavae"}
    for row in rows.values():
        assert {"metrics", "bands", "floats_per_image", "params", "flops"} <= set(row)
        assert {"Recon", "Low", "High", "PSNR", "SSIM", "rFD(efficientnet-lite0)"} <= set(row["metrics"])
        assert row["floats_per_image"] == 96
    generation = metrics["evaluations"]["generation"]
    names = ("FD", "IS", "precision", "recall", "KD")
    assert {f"{name}(efficientnet-lite0)" for name in names} <= set(generation["rows"][0]["metrics"])
    assert generation["protocol"]["num_images"] == 9
    assert metrics["training"]["favae"]["step"] == 8 and metrics["training"]["generator"]["seconds"] > 0
    page = (demo / "report.html").read_text()
    assert page.index("<img") < page.index("<table")  # pictures first
    assert page.count("data:image/png;base64,") == 4 + 3 + 2  # of evaluations, samples of training, curves
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert len(list((demo / "favae/samples").glob("*.png"))) == 2

    for folder in ("favae", "vavae", "generator"):
        files = {path.name for path in (demo / folder).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "final"} <= files
    terms = [json.loads(line) for line in (demo / "favae/metrics.jsonl").read_text().splitlines()]
    assert {"reconstruction", "kl", "alignment", "alignment_scale"} <= set(terms[0])
    assert "adversarial" not in terms[2] and "adversarial" in terms[3]  # off before its start step


def test_report_says_when_the_figures_are_not_reached():
    def entry(recon: float) -> dict:
        return {"model": "x", "metrics": {"Recon": recon, "High": 0.01}, "floats_per_image": 64, "flops": 100}

    better, worse = verdict(entry(0.01), entry(0.02)), verdict(entry(0.03), entry(0.02))
    assert "Recon is 0.50 times x's (lower)" in better
    assert "Recon is 1.50 times x's (NOT lower)" in worse


def test_there_must_be_something_to_report(tmp_path):
    assert str(tmp_path) in command_error("report", tmp_path)
