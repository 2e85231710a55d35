"""Conditions files: what is in one, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_model import SETTINGS

from cachec.compiler.calibration.conditions import FILE, conditions_facts, load_conditions, save_conditions
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.runtime.errors import InputError

PROMPTS = UsedPrompts(("a circle", "a ring", "a cross"), ("fit", "stop", "measure"))
CONDITIONS = {"prompt": np.arange(12, dtype=np.float32).reshape(3, 4), "guidance": np.ones(3, np.float32)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.safetensors"
    save_conditions(CONDITIONS, PROMPTS, conditions_facts("toy", SETTINGS), path)
    return path


def test_conditions_are_read_with_their_prompts_and_accepted_for_what_they_are_of(file):
    read = load_conditions(file)
    assert read.prompts == PROMPTS
    assert read.origin == str(file)
    assert set(read.conditions) == set(CONDITIONS)
    for name, value in CONDITIONS.items():
        np.testing.assert_array_equal(read.conditions[name], value)
    read.check("toy", replace(SETTINGS, steps=99, dtype="bfloat16"))  # which no text encoder looks at


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("flux", {}, "model is toy, wanted flux"),
        ("toy", {"height": 12}, "height is 16, wanted 12"),
        ("toy", {"width": 12}, "width is 24, wanted 12"),
        ("toy", {"text_tokens": 9}, "text_tokens is 1, wanted 9"),
        ("toy", {"guidance": 3.5}, "guidance is 1.0, wanted 3.5"),
    ],
)
def test_conditions_of_something_else_are_refused(file, name, changed, reason):
    with pytest.raises(InputError, match=f"of something else: {reason}. Make one for these settings with cachec encode"):
        load_conditions(file).check(name, replace(SETTINGS, **changed))


def rewritten(path, arrays=None, **facts):
    known = {**FILE.read(path)[1], **facts}
    save_file(load_file(path) if arrays is None else arrays, path, {k: v for k, v in known.items() if v is not None})


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": None},
        {"uses": "["},
        {"prompts": "3"},
        {"arrays": {"prompt": CONDITIONS["prompt"][:2]}},
        {"arrays": {"prompt": np.array(1.0, np.float32)}},
    ],
    ids=["no prompts", "no list", "a number", "a prompt less", "no prompts in it"],
)
def test_a_damaged_file_is_refused(file, changed):
    rewritten(file, **changed)
    with pytest.raises(InputError, match="is not a conditions file, or is damaged"):
        load_conditions(file)


def test_a_file_of_another_format_is_refused(file):
    rewritten(file, format="cachec-calibration-2")
    with pytest.raises(InputError, match="is not a conditions file of this cachec"):
        load_conditions(file)


def test_conditions_that_are_not_finite_are_not_written(tmp_path):
    values = CONDITIONS["prompt"].copy()
    values[1, 2] = np.nan
    with pytest.raises(InputError, match="prompt of prompt 'a ring' holds NaN or infinity"):
        save_conditions({"prompt": values}, PROMPTS, {}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
