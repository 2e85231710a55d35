"""Options: declared once, read by name in Python and as flags on the command line."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cachec.cli import main
from cachec.compiler.models import MODELS
from cachec.compiler.options import (
    BuildWish,
    Options,
    as_flags,
    declared,
    make_all_settings,
    make_settings,
    read_options,
)
from cachec.runtime.errors import InputError
from cachec.runtime.variants import PictureSize


def test_options_go_to_their_groups():
    wish = read_options({"steps": 8, "options": {"order": "2"}, "prompts": "p.txt", "targets": "eager", "workspace": 2})
    assert wish.model.steps == (8,)
    assert wish.schedule.options == {"order": "2"}
    assert wish.fit.prompts == Path("p.txt")
    assert wish.build.targets == ("eager",)
    assert wish.build.workspace == 2.0
    assert read_options({}) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 8}, r"unknown option 'step'. Did you mean 'steps'\?"),
        ({"steps": "eight"}, "steps is 'eight'; it must be a whole number, or several"),
        ({"size": 64}, "size is 64; it must be WIDTHxHEIGHT, or several"),
        ({"size": "64"}, "size '64' is not of the form WIDTHxHEIGHT"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"text_tokens": 1.5}, "text-tokens is 1.5; it must be a whole number"),
        ({"guidance": "3"}, "guidance is '3'; it must be a number"),
        ({"velocities": "no"}, "velocities is 'no'; it must be True or False"),
        ({"targets": 3}, "targets is 3; it must be one name or several"),
        ({"options": "order=2"}, "options is 'order=2'; it must be names with their values"),
    ],
)
def test_wrong_names_and_types_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        read_options(given)


def test_a_command_takes_its_own_options_only():
    assert read_options({"seed": 3}, "calibrate").fit.seed == 3
    with pytest.raises(InputError, match="unknown option 'levels'"):
        read_options({"levels": "high"}, "train")


@pytest.mark.parametrize("command", ["compile", "train", "calibrate", "encode", "add-target"])
def test_the_command_line_has_a_flag_for_every_option(command):
    known = {parameter.name: parameter for parameter in main.commands[command].params}
    for _, one, _ in declared(command):
        parameter = known[one.name]
        assert isinstance(parameter, click.Option)
        assert parameter.help == one.metadata["help"]
        flags = one.metadata["flags"] or (f"--{one.name.replace('_', '-')}",)
        assert tuple(parameter.opts) == flags


def test_flags_become_values(monkeypatch):
    taken = {}
    monkeypatch.setattr("cachec.compiler.commands.compile.compile_to_bundle", lambda *_, **given: taken.update(given) or 1 / 0)
    line = ["compile", "m", "--no-velocities", "--set", "order=2", "--target", "ort", "--target", "eager", "--guidance", "3"]
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(main, line, catch_exceptions=False)
    assert (taken["velocities"], taken["options"], taken["targets"]) == (False, {"order": "2"}, ("ort", "eager"))
    assert taken.pop("force") is False
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(main, ["compile", "m"], catch_exceptions=False)
    assert taken.pop("force") is False
    assert read_options(taken) == Options()


@pytest.mark.parametrize(
    ("given", "steps", "size"),
    [
        ({"steps": 8, "size": "64x32"}, (8,), (PictureSize(64, 32),)),
        ({"steps": "20,28", "size": ["64x32", "32x32x5"]}, (20, 28), (PictureSize(64, 32), PictureSize(32, 32, 5))),
        ({"steps": [4, 8]}, (4, 8), None),
    ],
)
def test_lists_may_be_one_text(given, steps, size):
    model = read_options(given).model
    assert (model.steps, model.size) == (steps, size)


def test_settings_are_of_every_size_with_every_number_of_steps():
    found = make_all_settings(MODELS["tiny-flux"], read_options({"steps": "20,8", "size": "64x128,32x64"}).model)
    assert [(one.width, one.height, one.steps) for one in found] == [(64, 128, 20), (64, 128, 8), (32, 64, 20), (32, 64, 8)]


def test_the_longest_text_is_what_all_else_is_made_at():
    (found,) = make_all_settings(MODELS["qwen-image"], read_options({"text_tokens": "512,64,128"}).model)
    assert (found.text_tokens, found.shorter_texts) == (512, (64, 128))
    assert [(one.text_tokens, one.shorter_texts) for one in found.by_text] == [(512, ()), (128, ()), (64, ())]
    with pytest.raises(InputError, match="text-tokens is 64,128, but only compile takes several: give one"):
        make_settings(MODELS["qwen-image"], read_options({"text_tokens": "64,128"}).model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "20,20"}, "steps 20 is given twice"),
        ({"text_tokens": "16,16"}, "text-tokens 16 is given twice"),
        ({"size": "64x32,32x32,64x32"}, "size 64x32 is given twice"),
        ({"size": "64x32", "width": 64}, "--size contradicts --height and --width"),
        ({"steps": "8,0"}, "steps is 0; it must be at least 1"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        make_all_settings(MODELS["tiny-flux"], read_options(given).model)


def test_all_sizes_are_those_that_the_family_lists():
    found = make_all_settings(MODELS["wan-2.2"], read_options({"steps": "20,8", "size": "all"}).model)
    assert [(one.size, one.steps) for one in found][:3] == [("1280x720x81", 20), ("1280x720x81", 8), ("720x1280x81", 20)]
    for spec in filter(lambda spec: spec.sizes, MODELS.values()):  # the usual one first
        every, usual = (make_all_settings(spec, read_options(of).model) for of in ({"size": "all"}, {}))
        assert every[0] == usual[0]
    with pytest.raises(InputError, match="dit has no list of sizes: give them, as"):
        make_all_settings(MODELS["dit"], read_options({"size": "all"}).model)
    with pytest.raises(InputError, match="size is all, but only compile takes several"):
        make_settings(MODELS["wan"], read_options({"size": "all"}).model)


def test_other_commands_take_one_size_and_one_number_of_steps():
    with pytest.raises(InputError, match="steps is 20,8, but only compile takes several"):
        make_settings(MODELS["tiny-flux"], read_options({"steps": "20,8"}, "train").model)


def test_flags_give_another_command_the_same_options():
    wish = BuildWish(targets=("tensorrt",), device="cuda:1", strip_weights=True, workspace=2.5, max_batch=4)
    assert as_flags(wish, "add-target") == ["--strip-weights", "--workspace", "2.5", "--max-batch", "4"]
    assert as_flags(BuildWish(), "add-target") == []
