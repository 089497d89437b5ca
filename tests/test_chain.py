"""The whole chain once, tiny, as the Makefile runs it; and the files a demo leaves."""

import json

from conftest import command, command_error, tiny_generator_recipe, tiny_tokenizer_recipe, write_images

from favae.eval.report import verdict

PLAIN = """
model: {name: AutoencoderKL, down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D],
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D], block_out_channels: [8, 8, 16],
  norm_num_groups: 4, latent_channels: 6, sample_size: 16}
"""


def test_the_whole_chain(tmp_path, capsys):
    demo = tmp_path / "demo"
    images = write_images(tmp_path / "images")
    ours = tiny_tokenizer_recipe(tmp_path, images)
    plain = tmp_path / "plain.yaml"
    plain.write_text(PLAIN + ours.read_text()[ours.read_text().index("data:") :])
    alignment = ["loss.alignment.weight=0.1", "loss.alignment.backbone=efficientnet-lite0"]  # adaptive
    command("train-tokenizer", ours, f"output={demo / 'favae'}", *alignment)
    command("train-tokenizer", plain, f"output={demo / 'vavae'}", *alignment)
    final = demo / "favae/final"
    cache = ("--data", images, "--resolution", "16", "--output", demo / "latents")
    command("cache-latents", "--tokenizer", final, *cache)
    recipe = tiny_generator_recipe(tmp_path, demo / "latents", final)
    command("train-generator", recipe, f"output={demo / 'generator'}")
    models = ("--model", f"vavae={demo / 'vavae/final'}", "--model", f"favae={final}")
    features = ("--features", "efficientnet-lite0")
    for name in ("reconstruction", "reconstruction_validation"):
        arguments = ("--data", images, "--resolution", "16", *features, "--output", demo / name)
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
    assert set(metrics["tokenizers"]) == {"favae", "vavae"}
    for entry in metrics["tokenizers"].values():
        assert {"metrics", "bands", "floats_per_image", "params", "flops", "seconds"} <= set(entry)
        assert {"Recon", "Low", "High", "PSNR", "SSIM", "rFD(efficientnet-lite0)"} <= set(entry["metrics"])
        assert entry["floats_per_image"] == 96 and entry["steps"] == 8
    names = ("FD", "IS", "precision", "recall", "KD")
    assert {f"{name}(efficientnet-lite0)" for name in names} <= set(metrics["generator"]["metrics"])
    assert metrics["generator"]["protocol"]["num_images"] == 9
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
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
        return {"metrics": {"Recon": recon, "High": 0.01}, "floats_per_image": 64, "steps": 10, "flops": 100}

    better, worse = verdict(entry(0.01), entry(0.02)), verdict(entry(0.03), entry(0.02))
    assert "Recon is 0.50 times the baseline's (lower)" in better
    assert "Recon is 1.50 times the baseline's (NOT lower)" in worse


def test_report_names_the_missing_step(tmp_path):
    assert "reconstruction/results.json" in command_error("report", tmp_path)
