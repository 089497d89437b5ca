"""Comparison: refused across protocols, a verdict only beyond the spread of seeds."""

import copy
import json

import pytest
from conftest import command, command_error

from favae.errors import DataError
from favae.eval.compare import compare_results, load_results, verdict

PROTOCOL = {"num_images": 100, "posterior": "mode", "data": {"hash": "abc"}, "data_name": "somewhere"}


def result(tmp_path, name: str, rows: list[dict], **protocol) -> str:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"task": "reconstruction", "protocol": {**PROTOCOL, **protocol}, "rows": rows}))
    return str(file)


def row(model: str, recon: float, psnr: float, **more) -> dict:
    return {"model": model, "metrics": {"Recon": recon, "PSNR": psnr, "LPIPS": None}, **more}


def test_judgement_knows_the_direction_and_the_spread():
    assert verdict("Recon", [0.10, 0.11], [0.05, 0.06]) == "B"
    assert verdict("PSNR", [20.0, 20.1], [19.0, 19.1]) == "A"
    assert verdict("rFD(efficientnet-lite0)", [3.0, 3.1], [1.0, 1.1]) == "B"
    assert verdict("precision(efficientnet-lite0)", [0.3, 0.31], [0.5, 0.51]) == "B"
    assert verdict("FD-DINOv2", [3.0, 3.1], [4.0, 4.1]) == "A"
    assert verdict("Recon", [0.10, 0.20], [0.12, 0.16]) == "within the spread"
    assert verdict("Recon", [0.10], [0.05]) == "B (one seed)"
    assert verdict("Recon", [0.10], [0.10]) == "equal"
    assert verdict("seams", [1.0], [0.7]) == verdict("power kept", [1.0], [1.4]) == "A (one seed)"
    assert verdict("MIND_floor", [1.0], [0.7]) == verdict("MIND_floor(efficientnet-lite0)", [1.0], [0.7]) == ""


def test_results_of_one_protocol(tmp_path, capsys):
    a = result(tmp_path, "a", [row("x", 0.10, 20.0), row("x", 0.11, 20.2), row("y", 1.0, 1.0)])
    b = result(tmp_path, "b", [row("z", 0.05, 20.1), row("z", 0.06, 20.3)], data_name="elsewhere", patch_size=16)
    command("compare", f"{a}:x", b)
    printed = capsys.readouterr().out
    assert "A: x (2 seeds), B: z (2 seeds)" in printed and "0.10500 ± 0.00707" in printed
    lines = {line.split()[0]: line for line in printed.splitlines()[2:]}
    assert lines["Recon"].endswith(" B") and lines["PSNR"].endswith("within the spread") and "LPIPS" not in lines
    assert "x, y" in command_error("compare", a, b)
    assert "'w'" in command_error("compare", f"{a}:w", b)


def test_other_protocols_are_refused_unless_forced(tmp_path, capsys):
    a = result(tmp_path, "a", [row("x", 0.10, 20.0)])
    b = result(tmp_path, "b", [row("x", 0.05, 21.0)], posterior="sample", data={"hash": "def"})
    assert "--force" in command_error("compare", a, b)
    printed = capsys.readouterr().out
    assert 'posterior: "mode" and "sample"' in printed and '{"hash": "abc"} and {"hash": "def"}' in printed
    command("compare", a, b, "--force")
    printed = capsys.readouterr().out
    assert "different protocols" in printed and "B (one seed)" in printed


def test_meters_of_latents_of_two_shapes_are_not_compared(tmp_path, capsys):
    rows = [row("a", 0.1, 20.0, latent_shape=[16, 8, 8]), row("b", 0.2, 21.0, latent_shape=[32, 4, 4])]
    file = result(tmp_path, "a", rows)
    command_error("compare", f"{file}:a", f"{file}:b")
    assert "latent_shape: [16, 8, 8] and [32, 4, 4]" in capsys.readouterr().out


def test_guidance_scales_are_matched(tmp_path):
    a = load_results(result(tmp_path, "a", [row("x", 1.0, 1.0, guidance_scale=s) for s in (1.0, 1.5)]))
    b = load_results(result(tmp_path, "b", [row("y", 2.0, 1.0, guidance_scale=1.5)]))
    text = compare_results(a, b)
    assert text.count("A: x") == 1 and "guidance 1.5" in text
    c = copy.deepcopy(b)
    c["rows"][0]["guidance_scale"] = 4.0
    with pytest.raises(DataError, match="1.0, 1.5 and 4.0"):
        compare_results(a, c)
    unknown = load_results(result(tmp_path, "d", [row("folder", 3.0, 1.0)]))
    assert "A: y" in compare_results(b, unknown)  # one set on each side: nothing else could be meant


def test_curves_of_compression_are_not_seeds(tmp_path):
    rates = load_results(result(tmp_path, "a", [row("x", 1.0, 1.0), row("x", 2.0, 2.0)])) | {"task": "compression"}
    with pytest.raises(DataError, match="BD-rates"):
        compare_results(rates, rates)


def test_files_that_are_no_results(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "none.json"):
        with pytest.raises(DataError, match=name):
            load_results(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "{}", '{"task": "reconstruction", "protocol": {}, "rows": [{"model": "a", "metrics": 1}]}'],
)
def test_a_damaged_file_is_named(content, tmp_path):
    whole = result(tmp_path, "a", [row("x", 1.0, 1.0)])
    (tmp_path / "run").mkdir()
    damaged = tmp_path / "run" / "results.json"
    damaged.write_text(content)
    assert str(damaged) in command_error("compare", whole, damaged)
    assert str(damaged) in command_error("report", tmp_path)


@pytest.mark.parametrize(
    "lines, bad", [('{"step": 1}\n{"st', None), ('{"step": 1}\n{"st\n{"step": 3}', 2), ("5\n{}", 1)]
)
def test_a_torn_last_line_of_a_log_is_left_out(lines, bad, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    if bad is None:
        command("report", tmp_path)
    else:
        assert f"metrics.jsonl: line {bad} is damaged" in command_error("report", tmp_path)
