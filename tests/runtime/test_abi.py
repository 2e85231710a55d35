import re
from pathlib import Path

import pytest

import cachec.runtime
from cachec.runtime import abi

NAMES = {name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, str)}
RUNTIME = Path(next(iter(cachec.runtime.__path__)))


def test_every_name_stands_for_one_thing():
    assert len(set(NAMES.values())) == len(NAMES)
    assert all(re.fullmatch(r"[a-z_]+[0-9]?", value) for value in NAMES.values())


def test_names_that_are_put_together():
    assert (abi.steps_of("compute"), abi.timesteps_of("unguided")) == ("compute_steps", "unguided_timesteps")
    assert (abi.history_name(2), abi.hoisted_name("forecast", "text")) == ("feature_2", "forecast_text")


@pytest.mark.parametrize(
    ("names", "window"),
    [(["feature_0", "feature_1", "step"], 2), (["feature_2", "feature_0"], 3), (["feature", "features", "3", "prompt_1"], 0)],
)
def test_the_window_is_counted_to_the_oldest_feature(names, window):
    assert abi.history_window(names) == window


@pytest.mark.parametrize("module", ["plan", "program", "binding", "session", "stepper", "sizes"])
def test_names_are_written_in_one_place(module):
    text = re.sub(r'""".*?"""|#[^\n]*|: ClassVar\[str\] = "\w+"', "", (RUNTIME / f"{module}.py").read_text(), flags=re.S)
    words = set(re.findall(r'"(\w+)"', text))
    keys = {"coefficients", "bias", "sigmas", "slots", "velocity"}  # fields of programs, and a buffer of the plan
    assert not words & set(NAMES.values()) - keys
