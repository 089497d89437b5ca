"""Comparison: refused across protocols, a verdict only beyond the spread of seeds."""

import copy
import json

import pytest

from favae.errors import DataError
from favae.eval.compare import compare, judge, load_results, main

PROTOCOL = {"num_images": 100, "posterior": "mode", "data": {"hash": "abc"}, "data_name": "somewhere"}


def result(tmp_path, name: str, rows: list[dict], **protocol) -> str:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"kind": "reconstruction", "protocol": {**PROTOCOL, **protocol}, "rows": rows}))
    return str(file)


def row(model: str, recon: float, psnr: float, **more) -> dict:
    return {"model": model, "metrics": {"Recon": recon, "PSNR": psnr, "LPIPS": None}, **more}


def test_judgement_knows_the_direction_and_the_spread():
    assert judge("Recon", [0.10, 0.11], [0.05, 0.06]) == "B"
    assert judge("PSNR", [20.0, 20.1], [19.0, 19.1]) == "A"
    assert judge("rFD(efficientnet-lite0)", [3.0, 3.1], [1.0, 1.1]) == "B"
    assert judge("precision(efficientnet-lite0)", [0.3, 0.31], [0.5, 0.51]) == "B"
    assert judge("FD-DINOv2", [3.0, 3.1], [4.0, 4.1]) == "A"
    assert judge("Recon", [0.10, 0.20], [0.12, 0.16]) == "within the spread"
    assert judge("Recon", [0.10], [0.05]) == "B (one seed)"
    assert judge("Recon", [0.10], [0.10]) == "equal"


def test_results_of_one_protocol(tmp_path, capsys):
    a = result(tmp_path, "a", [row("x", 0.10, 20.0), row("x", 0.11, 20.2), row("y", 1.0, 1.0)])
    b = result(tmp_path, "b", [row("z", 0.05, 20.1), row("z", 0.06, 20.3)], data_name="elsewhere")
    main([f"{a}:x", b])
    printed = capsys.readouterr().out
    assert "A: x (2 seeds), B: z (2 seeds)" in printed and "0.10500 ± 0.00707" in printed
    lines = {line.split()[0]: line for line in printed.splitlines()[2:]}
    assert lines["Recon"].endswith(" B") and lines["PSNR"].endswith("within the spread") and "LPIPS" not in lines
    with pytest.raises(SystemExit, match=r"several models \(x, y\); choose one with FILE:MODEL"):
        main([a, b])
    with pytest.raises(SystemExit, match="has no model 'w', there are x, y"):
        main([f"{a}:w", b])


def test_other_protocols_are_refused_unless_forced(tmp_path, capsys):
    a = result(tmp_path, "a", [row("x", 0.10, 20.0)])
    b = result(tmp_path, "b", [row("x", 0.05, 21.0)], posterior="sample", data={"hash": "def"})
    with pytest.raises(SystemExit) as refused:
        main([a, b])
    message = str(refused.value)
    assert 'posterior: "mode" and "sample"' in message and '{"hash": "abc"} and {"hash": "def"}' in message
    main([a, b, "--force"])
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: different protocols") and "B (one seed)" in printed


def test_guidance_scales_are_matched(tmp_path):
    a = load_results(result(tmp_path, "a", [row("x", 1.0, 1.0, guidance_scale=s) for s in (1.0, 1.5)]))
    b = load_results(result(tmp_path, "b", [row("y", 2.0, 1.0, guidance_scale=1.5)]))
    text = compare(a, b)
    assert text.count("A: x") == 1 and "guidance 1.5" in text
    c = copy.deepcopy(b)
    c["rows"][0]["guidance_scale"] = 4.0
    with pytest.raises(DataError, match="no common guidance scale: 1.0, 1.5 and 4.0"):
        compare(a, c)
    unknown = load_results(result(tmp_path, "d", [row("folder", 3.0, 1.0)]))
    assert "A: y" in compare(b, unknown)  # one set on each side: nothing else could be meant


def test_files_that_are_no_results(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for text, message in ((f"{tmp_path}/x.json", "is no results.json"), (f"{tmp_path}/none.json", "No such file")):
        with pytest.raises(DataError, match=message):
            load_results(text)
