"""The GPU check on the CPU, on a model of no size: that its sections work, and that it says what it left out."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

speed_report = pytest.importorskip("bench.speed_report", reason="the source tree is not beside the tests")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="the source tree is not beside the tests"),
    pytest.mark.slow,
]


def check(*arguments, cwd=ROOT):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # it finds the tree by itself
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "check.json"
    done = check(
        "-m",
        "bench.gpu_check",
        "--device",
        "cpu",
        "--small",
        "--repeats",
        "2",
        "--backend",
        "eager,ort,tensorrt,no",
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_it_says_what_it_ran_on(report):
    setting = report["setting"]
    assert setting["device"] == "cpu"
    assert setting["small"]
    assert "gpu" not in setting
    assert setting["packages"]["torch"]


def test_what_was_left_out_has_its_reason(report):
    sections = {entry["section"]: entry for entry in report["sections"]}
    skipped = {name: entry["reason"] for name, entry in sections.items() if entry["status"] != "ok"}
    case = report["cases"][0]["case"]
    assert skipped["tiny-flux"] == "--small"
    assert "bfloat16" in skipped[f"{case}: build ort"]
    assert "pip install 'cachec[tensorrt]'" in skipped[f"{case}: build tensorrt"]
    assert "unknown backend 'no'" in skipped[f"{case}: build no"]
    assert not any(entry["status"] == "failed" for entry in sections.values())


def test_rows_are_measured_and_near_eager(report):
    (case,) = report["cases"]
    assert case["dtype"] == "bfloat16"
    assert (case["blocks"], case["full_width"]) == ([1, 1], False)
    rows = {row["row"]: row for row in case["rows"]}
    assert {"diffusers", "diffusers TaylorSeer", "cachec eager, uncached", "cachec eager, hidden cut, 4"} <= set(rows)
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert math.isfinite(row["first_seconds"])
        assert row["runs"] == 2
    uncached = rows["cachec eager, uncached"]
    assert uncached["parity"]
    assert uncached["distance_from_eager"] < 0.05  # eager rounds its timesteps, cachec does not
    assert uncached["replayed_from_one_recording"] is False  # there is nothing to record on the CPU
    assert len(rows["cachec eager, output cut, 4"]["computed"]) == 4


def test_its_rows_stand_in_the_report_of_the_speed_bench(report):
    text = speed_report.report({"quick": False, "parts": {}, "missing": [], "gpu": report}, {})
    (case,) = report["cases"]
    for row in case["rows"]:
        assert f"| {row['row']} | {row['steps']} | {len(row['computed'])} | {row['seconds']:.4g} |" in text
    assert "- tiny-flux: skipped, --small" in text


def test_the_full_models_are_not_for_a_cpu(tmp_path):
    done = check("-m", "bench.gpu_check", "--device", "cpu", "--out", tmp_path / "none.json")
    assert done.returncode != 0
    assert "add --small" in done.stderr
