"""Options: declared once, read by name in Python and as flags on the command line."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cachec.cli import main
from cachec.compiler.options import BuildWish, Options, as_flags, declared, read_options
from cachec.runtime.errors import InputError


def test_options_go_to_their_groups():
    wish = read_options({"steps": 8, "options": {"order": "2"}, "prompts": "p.txt", "targets": "eager", "workspace": 2})
    assert wish.model.steps == 8
    assert wish.schedule.options == {"order": "2"}
    assert wish.fit.prompts == Path("p.txt")
    assert wish.build.targets == ("eager",)
    assert wish.build.workspace == 2.0
    assert read_options({}) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 8}, r"unknown option 'step'. Did you mean 'steps'\?"),
        ({"steps": "8"}, "steps is '8'; it must be a whole number"),
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


def test_flags_give_another_command_the_same_options():
    wish = BuildWish(targets=("tensorrt",), device="cuda:1", strip_weights=True, workspace=2.5, max_batch=4)
    assert as_flags(wish, "add-target") == ["--strip-weights", "--workspace", "2.5", "--max-batch", "4"]
    assert as_flags(BuildWish(), "add-target") == []
