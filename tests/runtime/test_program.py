import json
from dataclasses import replace

import numpy as np
import pytest

from cachec.runtime.errors import BundleError
from cachec.runtime.program import Advance, Compute, Forecast, Predict, Program, ProgramKey, hash_sigmas

STEPS = 4
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
INSTRUCTIONS = (Compute(0, 0), Compute(1, 1), Forecast((2,), 2), Compute(3, None))
COEFFICIENTS = np.array([[0, 0], [0, 0], [-1, 2], [0, 0]], np.float32)


def make_program(**changes):
    fields = {
        "key": ProgramKey(STEPS, hash_sigmas(SIGMAS), height=64, width=64, text_tokens=8),
        "instructions": INSTRUCTIONS,
        "capacity": 2,
        "sigmas": SIGMAS,
        "timesteps": SIGMAS[:-1],
        "coefficients": COEFFICIENTS,
        "bias": np.zeros(STEPS, np.float32),
    }
    return Program(**{**fields, **changes})


def test_a_good_program_is_accepted():
    assert make_program().compute_steps == (0, 1, 3)


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((Compute(0, 0), Forecast((1,), 2), Compute(2, 1), Compute(3, None)), r"steps \(1,\) read slots \[1\] before"),
        ((Predict(0, (0,), (0,), 1), *INSTRUCTIONS[1:]), "which are not before it"),
        ((Compute(0, 0), Predict(1, (), (), 1), *INSTRUCTIONS[2:]), r"has sources \(\)"),
        ((Compute(0, 0), Predict(1, (0, 1), (0, 0), None), *INSTRUCTIONS[2:]), r"read slots \[1\] before any write"),
        ((*INSTRUCTIONS[:2], Forecast((2,), 0), Compute(3, None)), "reads no slot"),
        (INSTRUCTIONS[:-1], "covers steps"),
        ((), "covers steps"),
        ((*INSTRUCTIONS[:2], Forecast((2, 2), 2), Compute(3, None)), "covers steps"),
        ((*INSTRUCTIONS, Compute(3, None)), "covers steps"),
        ((*INSTRUCTIONS, Compute(4, None)), "covers steps"),
        ((Compute(1, 1), Compute(0, 0), *INSTRUCTIONS[2:]), "covers steps"),
        ((*INSTRUCTIONS[:-1], Compute(3, 2)), "slot 2 does not exist, there are 2"),
        ((*INSTRUCTIONS[:-1], Compute(3, -1)), "slot -1 does not exist"),
        ((*INSTRUCTIONS[:-1], Predict(3, (0,), (0,), 7)), "slot 7 does not exist"),
        ((*INSTRUCTIONS[:2], Forecast((2,), 1), Compute(3, None)), "coefficients for slots that are not bound"),
        ((*INSTRUCTIONS[:2], Forecast((2,), 3), Compute(3, None)), r"read slots \[2\] before any write"),
    ],
)
def test_impossible_instructions_are_refused(instructions, message):
    with pytest.raises(BundleError, match=message):
        make_program(instructions=instructions)


@pytest.mark.parametrize("name", ["sigmas", "timesteps", "coefficients", "bias"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a[:-1], "expected float32"),
        (lambda a: a[..., None], "expected float32"),
        (lambda a: a.astype(np.float64), "is float64"),
        (lambda a: np.where(a == a.flat[0], np.float32(np.nan), a), "holds NaN or infinity"),
        (lambda a: np.where(a == a.flat[0], np.float32(np.inf), a), "holds NaN or infinity"),
    ],
    ids=["short", "axis", "float64", "nan", "inf"],
)
def test_unfit_arrays_are_refused_by_name(name, damage, message):
    good = getattr(make_program(), name)
    with pytest.raises(BundleError, match=f"{name} .*{message}"):
        make_program(**{name: damage(good)})


def test_sigmas_other_than_those_of_the_key_are_refused():
    with pytest.raises(BundleError, match="not the ones that its key names"):
        make_program(sigmas=SIGMAS * np.float32(0.999))


def test_a_late_start_covers_only_the_later_steps():
    key = replace(make_program().key, start_step=1)
    late = make_program(
        key=key, instructions=(Compute(1, 0), Compute(2, 1), Forecast((3,), 2)), coefficients=COEFFICIENTS[[0, 0, 0, 2]]
    )
    assert late.compute_steps == (1, 2)
    with pytest.raises(BundleError, match="covers steps"):
        make_program(key=key)


@pytest.mark.parametrize(
    "program",
    [
        make_program(),
        make_program(
            instructions=(
                Compute(0, 0),
                Predict(1, (0, 0), (0, 0), 1),
                Predict(2, (1, 0), (1, 0), None),
                Compute(3, None),
            ),
            coefficients=np.zeros((STEPS, 2), np.float32),
        ),
        make_program(instructions=(*INSTRUCTIONS[:2], Forecast((2, 3), 2))),
    ],
    ids=["forecast", "predict", "run of forecasts"],
)
def test_json_round_trip_keeps_the_digest(program):
    read = Program.from_json(json.loads(json.dumps(program.to_json())), program.arrays())
    assert read.digest() == program.digest()
    assert read.instructions == program.instructions
    assert read.key == program.key


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": COEFFICIENTS * 2},
        {"bias": np.array([0, 0, 0.5, 0], np.float32)},
        {"timesteps": SIGMAS[:-1] * 1000},
        {"instructions": (*INSTRUCTIONS[:-1], Compute(3, 0))},
    ],
    ids=["coefficients", "bias", "timesteps", "instructions"],
)
def test_the_digest_sees_every_change(changes):
    assert make_program(**changes).digest() != make_program().digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("key"),
        lambda data: data["key"].pop("sigmas_hash"),
        lambda data: data["key"].update(colour="red"),
        lambda data: data["instructions"][0].update(op="guess"),
        lambda data: data["instructions"][0].pop("step"),
        lambda data: data["instructions"][0].update(colour="red"),
    ],
    ids=["no key", "no hash", "unknown key field", "unknown op", "no step", "unknown field"],
)
def test_a_file_that_is_no_program_is_refused(damage):
    data = make_program().to_json()
    damage(data)
    with pytest.raises(BundleError, match="does not read as a program"):
        Program.from_json(data, make_program().arrays())


# The output cut

MOVES = (Compute(0, 0), Advance((0, 1), 1), Compute(2, 1), Advance((2, 3), 2))
ROWS = np.array([[-0.5, 0], [0, 0], [-0.25, -0.75], [0, 0]], np.float32)


def make_output_program(**changes):
    return make_program(**{"instructions": MOVES, "coefficients": ROWS, "cut": "output", **changes})


def test_an_output_program_is_accepted():
    program = make_output_program()
    assert program.compute_steps == (0, 2)
    assert program.num_steps == STEPS


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((), "covers steps .., expected each of"),
        (MOVES[:2], r"covers steps \[0, 1\], expected each of \[0, 1, 2, 3\]"),
        ((*MOVES[:3], Advance((2,), 2)), r"covers steps \[0, 1, 2\]"),
        ((*MOVES[:3], Advance((2, 3, 4), 2)), r"covers steps \[0, 1, 2, 3, 4\]"),
        ((*MOVES[:3], Advance((2, 2, 3), 2)), r"covers steps \[0, 1, 2, 2, 3\]"),
        ((Compute(0, 0), Advance((0,), 1), *MOVES[2:]), r"covers steps \[0, 2, 3\]"),
        ((Compute(0, 0), Advance((0, 1, 2), 1), *MOVES[2:]), r"covers steps \[0, 1, 2, 2, 3\]"),
        ((*MOVES[2:], *MOVES[:2]), "covers steps"),
        (MOVES[:3], "each computed step is followed by its advance, got Compute.step=2.*, None"),
        ((*MOVES, Compute(3, 1)), "each computed step is followed by its advance"),
        ((*MOVES, Advance((3,), 2)), "each computed step is followed by its advance"),
        (MOVES[1:], "each computed step is followed by its advance, got Advance"),
        ((MOVES[0], MOVES[2], MOVES[1], MOVES[3]), "each computed step is followed by its advance"),
        ((MOVES[0], Advance((1,), 1), *MOVES[2:]), "each computed step is followed by its advance"),
        ((MOVES[0], Advance((), 1), *MOVES[2:]), "each computed step is followed by its advance"),
        ((*MOVES[:2], Compute(3, 1), Advance((2, 3), 2)), "each computed step is followed by its advance"),
        ((*MOVES[:3], Advance((2, 3), 1)), r"steps \(2, 3\) have coefficients for slots that are not bound"),
        ((*MOVES[:3], Advance((2, 3), 3)), r"read slots \[2\] before any write"),
        ((MOVES[0], Advance((0, 1), 2), *MOVES[2:]), r"steps \(0, 1\) read slots \[1\] before any write"),
        ((Compute(0, None), *MOVES[1:]), r"steps \(0, 1\) read slots \[0\] before any write"),
        ((*MOVES[:2], Compute(2, None), MOVES[3]), r"steps \(2, 3\) read slots \[1\] before any write"),
        ((*MOVES[:3], Advance((2, 3), 0)), "advance of steps .* reads no slot"),
        ((*MOVES[:2], Compute(2, 2), MOVES[3]), "slot 2 does not exist, there are 2"),
        ((Compute(0, 0, branch="both"), *MOVES[1:]), "branch 'both' is not one of"),
        ((MOVES[0], Advance((0, 1), 1, branch="both"), *MOVES[2:]), "branch 'both' is not one of"),
        ((*MOVES[:2], Forecast((2, 3), 1)), "instruction 'forecast' does not exist on the output cut"),
        ((*MOVES[:2], Compute(2, 1), Predict(3, (0,), (0,), None)), "instruction 'predict' does not exist on the output cut"),
    ],
)
def test_impossible_moves_are_refused(instructions, message):
    with pytest.raises(BundleError, match=message):
        make_output_program(instructions=instructions)


def test_moves_do_not_exist_on_the_hidden_cut():
    with pytest.raises(BundleError, match="instruction 'advance' does not exist on the hidden cut"):
        make_output_program(cut="hidden")


@pytest.mark.parametrize("cut", ["", "velocity", None, ["output"]])
def test_an_unknown_cut_is_refused(cut):
    with pytest.raises(BundleError, match="is not one of .'hidden', 'output'."):
        make_output_program(cut=cut)


def test_a_row_counts_where_its_gap_begins_and_nowhere_else():
    """Rows of other steps are not read, so they may hold anything finite."""
    rows = ROWS.copy()
    rows[[1, 3]] = 7
    assert make_output_program(coefficients=rows).compute_steps == (0, 2)
    rows[0, 1] = 1
    with pytest.raises(BundleError, match=r"steps \(0, 1\) have coefficients for slots that are not bound"):
        make_output_program(coefficients=rows)


def test_a_bias_on_the_output_cut_is_refused():
    with pytest.raises(BundleError, match="bias"):
        make_output_program(bias=np.array([0, 0, 0.5, 0], np.float32))


def test_an_output_program_may_start_late():
    key = replace(make_program().key, start_step=2)
    assert make_output_program(key=key, instructions=(Compute(2, 0), Advance((2, 3), 1)), coefficients=ROWS[::-1] * 0)
    with pytest.raises(BundleError, match=r"covers steps \[0, 1, 2, 3\], expected each of \[2, 3\]"):
        make_output_program(key=key)


def test_an_output_program_survives_its_file():
    program = make_output_program(timesteps=np.array([0.9, 0.7, 0.4, 0.1], np.float32))
    read = Program.from_json(json.loads(json.dumps(program.to_json())), program.arrays())
    assert read.digest() == program.digest()
    assert (read.instructions, read.cut, read.capacity, read.key) == (MOVES, "output", 2, program.key)
    for name, array in program.arrays().items():
        assert np.array_equal(getattr(read, name), array)


def test_a_file_of_the_other_cut_is_refused():
    data = make_output_program().to_json()
    with pytest.raises(BundleError, match="does not exist on the hidden cut"):
        Program.from_json({**data, "cut": "hidden"}, make_output_program().arrays())
    del data["cut"]
    with pytest.raises(BundleError, match="does not read as a program"):
        Program.from_json(data, make_output_program().arrays())


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": ROWS * 2},
        {"timesteps": SIGMAS[:-1] * np.float32(0.9)},
        {"instructions": (*MOVES[:2], Compute(2, 1), Advance((2, 3), 2, branch="unconditional"))},
    ],
    ids=["rows", "timesteps", "instructions"],
)
def test_the_digest_of_an_output_program_sees_every_change(changes):
    assert make_output_program(**changes).digest() != make_output_program().digest()
