"""``cachec run`` on the toy: pictures, sheets, traces."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from toy_product import run_cli, succeed

from cachec.runtime.errors import InputError, OutputError

PROMPTS = ["a red circle", "a blue ring"]


def test_run_writes_pictures_and_does_not_replace_them(toy_bundles, tmp_path):
    said = succeed("run", toy_bundles / "both", "-p", PROMPTS[0], "-o", tmp_path / "one.png")
    assert re.search(r"text, pictures +those of .*, loaded by diffusers", said), "the bundle has none of its own"
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (24, 16)
        assert np.asarray(picture).std() > 5
    assert run_cli("run", toy_bundles / "both", "-p", PROMPTS[0], "-o", tmp_path / "one.png")[0] == OutputError.exit_code
    succeed("run", toy_bundles / "both", "-p", PROMPTS[0], "-p", PROMPTS[1], "-o", tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "x-1.png", "x-2.png"]
    assert (tmp_path / "x-1.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_compare_draws_one_sheet(toy_bundles, tmp_path):
    output = succeed("run", toy_bundles / "both", "-p", PROMPTS[0], "-p", PROMPTS[1], "-o", tmp_path / "sheet.png", "--compare")
    assert "times as fast" in output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * 16


def test_other_bundles_stand_beside_it_in_the_sheet(toy_bundles, tmp_path):
    given = ("run", toy_bundles / "both", "-p", PROMPTS[0], "--compare")
    succeed(*given, "-o", tmp_path / "two.png")
    output = succeed(*given, "-o", tmp_path / "three.png", "--beside", toy_bundles / "kept")
    decibels = next(line.split()[1] for line in output.splitlines() if line.startswith("PSNR"))
    (beside,) = [line for line in output.splitlines() if line.startswith("lesa ")]  # the same model: its uncached run is there
    assert float(beside.split(", ")[-1].removesuffix(" dB")) == pytest.approx(float(decibels), abs=0.1)
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "three.png") as three:
        assert 2 * (three.width - two.width) == two.width - 16


def test_a_profile_says_where_the_time_went(toy_bundles, tmp_path):
    output = succeed("run", toy_bundles / "both", "-p", "x", "-o", tmp_path / "x.png", "--profile", tmp_path / "trace.json")
    assert "compute" in output
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"prologue", "compute", "forecast"} <= names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--profile", "t.json", "--compare"], "--profile is of one run, --compare makes two"),
        (["--beside", "other.cachec"], "--beside is of --compare alone"),
        (["--seed", "-1"], "seed is -1"),
        (["--threads", "0"], "threads is 0"),
        (["--strength", "0.5"], "--picture and --strength are for bundles with an encoder of pictures"),
        (["--picture", "nowhere.png"], "--picture nowhere.png cannot be read: No such file"),
        (["-o", "x.jpg"], "-o is x.jpg, but pictures are written as PNG: name it x.png"),
    ],
)
def test_what_cannot_be_run_is_refused(toy_bundles, tmp_path, given, message):
    code, output = run_cli(
        "run", toy_bundles / "both", "-p", "x", *(["-o", tmp_path / "x.png"] if "-o" not in given else []), *given
    )
    assert code == InputError.exit_code
    assert message in output
    assert list(tmp_path.iterdir()) == []
