import json
from dataclasses import replace

import numpy as np
import pytest

from cachec.runtime.abi import FEATURE, VELOCITY
from cachec.runtime.errors import BundleError
from cachec.runtime.instructions import Advance, Compute, Forecast, Predict
from cachec.runtime.program import Program, ProgramKey, hash_sigmas

STEPS = 4
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
INSTRUCTIONS = (Compute(0, 0), Compute(1, 1), Forecast((2,), 2), Compute(3))
COEFFICIENTS = np.array([[0, 0], [0, 0], [-1, 2], [0, 0]], np.float32)[:, None]
MOVES = (Compute(0, 0, VELOCITY), Advance((0, 1), 1), Compute(2, 1, VELOCITY), Advance((2, 3), 2))
ROWS = np.array([[-0.5, 0], [0, 0], [-0.25, -0.75], [0, 0]], np.float32)[:, None]


def make_program(**changes):
    fields = {
        "key": ProgramKey(STEPS, hash_sigmas(SIGMAS), {"height": 64, "width": 64, "text_tokens": 8}),
        "instructions": INSTRUCTIONS,
        "slots": {FEATURE: 2},
        "sigmas": SIGMAS,
        "timesteps": SIGMAS[:-1],
        "coefficients": COEFFICIENTS,
        "bias": np.zeros(STEPS, np.float32),
    }
    return Program(**{**fields, **changes})


def make_output_program(**changes):
    out, share = ROWS[[0, 0, 2, 2]] * 2, np.zeros(STEPS, np.float32)
    fields = {"instructions": MOVES, "slots": {VELOCITY: 2}, "coefficients": ROWS, "rows_out": out, "share_out": share}
    return make_program(**{**fields, "cut": "output", **changes})


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((), 1, r"bias is float32\[\], expected float32\[4\]"),
        ((STEPS, 1), 1, r"bias is float32\[4, 1\], expected float32\[4, 2\]"),
        ((STEPS, 3), 3, r"bias is float32\[4, 3\], expected float32\[4, 2\]"),
        ((STEPS, 2, 1), 2, r"bias is float32\[4, 2, 1\], expected float32\[4\]"),
        ((STEPS, 2), 1, "it has a bias for each branch, but is not guided, or has no coefficients of each"),
        ((STEPS, 2), 2, "it has a bias for each branch, but is not guided, or has no coefficients of each"),
    ],
)
def test_biases_are_of_steps_or_of_both_branches(shape, groups, message):
    with pytest.raises(BundleError, match=message):
        make_program(bias=np.zeros(shape, np.float32), coefficients=np.repeat(COEFFICIENTS, groups, axis=1))


def test_good_programs_are_accepted():
    assert (make_program().compute_steps, make_program().capacity) == ((0, 1, 3), 2)
    assert (make_output_program().compute_steps, make_output_program().num_steps) == ((0, 2), STEPS)
    assert make_program(target_timesteps=SIGMAS[1:]).arrays().keys() - make_program().arrays().keys() == {"target_timesteps"}
    reused = {"instructions": (Compute(0, 0), Forecast((1, 2, 3), 1)), "coefficients": np.ones((STEPS, 1, 1), np.float32)}
    assert make_program(**reused, slots={FEATURE: 1}).capacity == 1


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((Compute(0, 0), Forecast((1,), 2), Compute(2, 1), Compute(3)), r"steps \(1,\) read feature slots \[1\] before"),
        ((Compute(0, 0), Predict(1, (), 1), *INSTRUCTIONS[2:]), r"predict of steps \(1,\) reads no slot"),
        ((Compute(0, 0), Predict(1, (0,), 0), *INSTRUCTIONS[2:]), r"steps \(1,\) write feature slot 0, which they read"),
        ((*INSTRUCTIONS[:2], Forecast((2,), 0), Compute(3)), "reads no slot"),
        (INSTRUCTIONS[:-1], r"covers steps \[0, 1, 2\], expected each of range\(0, 4\)"),
        ((), "covers steps"),
        ((*INSTRUCTIONS[:2], Forecast((2, 2), 2), Compute(3)), "covers steps"),
        ((Compute(1, 1), Compute(0, 0), *INSTRUCTIONS[2:]), "covers steps"),
        ((*INSTRUCTIONS[:-1], Compute(3, 2)), "'feature' slot 2 does not exist, there are 2"),
        ((*INSTRUCTIONS[:-1], Compute(3, -1)), "slot -1 does not exist"),
        ((*INSTRUCTIONS[:2], Forecast((2,), 1), Compute(3)), "coefficients for slots that are not bound"),
        ((*INSTRUCTIONS[:-1], Compute(3, True)), "does not read as an instruction"),
        ((*INSTRUCTIONS[:-1], Compute(3, 0, VELOCITY)), "covers steps"),
        (MOVES, "'velocity' slot 0 does not exist, there are 0"),
    ],
)
def test_impossible_instructions_are_refused(instructions, message):
    with pytest.raises(BundleError, match=message):
        make_program(instructions=instructions)


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (MOVES[:2], r"covers steps \[0, 1\], expected each of"),
        ((*MOVES[:3], Advance((2, 3, 4), 2)), r"covers steps \[0, 1, 2, 3, 4\]"),
        (MOVES[:3], "each computed step is followed by its advance, got Compute.step=2.*, None"),
        (MOVES[1:], "each computed step is followed by its advance, got Advance"),
        ((MOVES[0], MOVES[2], MOVES[1], MOVES[3]), "each computed step is followed by its advance"),
        ((MOVES[0], Advance((1,), 1), *MOVES[2:]), "each computed step is followed by its advance"),
        ((MOVES[0], Advance((), 1), *MOVES[2:]), "each computed step is followed by its advance"),
        ((Compute(0, 0), *MOVES[1:]), "each computed step is followed by its advance"),
        ((*MOVES[:3], Advance((2, 3), 1)), r"steps \(2, 3\) have coefficients for slots that are not bound"),
        ((Compute(0, None, VELOCITY), *MOVES[1:]), r"steps \(0, 1\) read velocity slots \[0\] before any write"),
        ((*MOVES[:2], MOVES[2], Forecast((2, 3), 1)), r"read feature slots \[0\] before any write"),
    ],
)
def test_impossible_moves_are_refused(instructions, message):
    with pytest.raises(BundleError, match=message):
        make_output_program(instructions=instructions)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sigmas", SIGMAS[:-1], r"sigmas is float32\[4\], expected float32\[5\]"),
        ("sigmas", SIGMAS * np.float32(0.999), "not the ones that its key names"),
        ("timesteps", SIGMAS[:-1].astype(np.float64), r"timesteps is float64\[4\], expected float32"),
        ("target_timesteps", SIGMAS, "target_timesteps is float32"),
        ("coefficients", COEFFICIENTS[:, 0], r"coefficients is float32\[4, 2\], expected float32\[4, 2, 2\]"),
        ("coefficients", COEFFICIENTS[..., :1], r"expected float32\[4, 1, 2\]"),
        ("bias", np.array([0, 0, np.inf, 0], np.float32), "bias holds NaN or infinity"),
        ("coefficients", COEFFICIENTS * np.nan, "coefficients holds NaN or infinity"),
        ("rows_out", COEFFICIENTS, "nothing reads them on the hidden cut"),
        ("cut", "velocity", "cut 'velocity' is not one of .'hidden', 'output'."),
        ("slots", {FEATURE: 0}, "0 slots of 'feature' are not what a session can have"),
        ("slots", {"colour": 2}, "2 slots of 'colour' are not"),
    ],
)
def test_unfit_facts_are_refused_by_name(name, value, message):
    with pytest.raises(BundleError, match=message):
        make_program(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bias", np.array([0, 0, 0.5, 0], np.float32), "nothing reads it on the output cut"),
        ("rows_out", None, "no rows for a sampler outside"),
        ("share_out", np.zeros(3, np.float32), r"share_out is float32\[3\]"),
        ("rows_out", ROWS[[2, 0, 2, 2]], r"steps \(0, 1\) have coefficients for slots that are not bound"),
    ],
)
def test_unfit_facts_of_the_output_cut_are_refused(name, value, message):
    with pytest.raises(BundleError, match=message):
        make_output_program(**{name: value})


def test_a_row_counts_where_its_gap_begins_and_nowhere_else():
    """Rows of other steps are not read, so they may hold anything finite."""
    rows = ROWS.copy()
    rows[[1, 3]] = 7
    assert make_output_program(coefficients=rows).compute_steps == (0, 2)
    rows[0, 0, 1] = 1
    with pytest.raises(BundleError, match=r"steps \(0, 1\) have coefficients for slots that are not bound"):
        make_output_program(coefficients=rows)


def test_a_late_start_covers_only_the_later_steps():
    key = replace(make_program().key, start_step=1)
    instructions = (Compute(1, 0), Compute(2, 1), Forecast((3,), 2))
    late = make_program(key=key, instructions=instructions, coefficients=COEFFICIENTS[[0, 0, 0, 2]])
    assert late.compute_steps == (1, 2)
    with pytest.raises(BundleError, match="covers steps"):
        make_program(key=key)
    with pytest.raises(BundleError, match="starts at step 4 of 4"):
        make_program(key=replace(key, start_step=4))


PREDICTED = make_program(
    instructions=(Compute(0, 0), Predict(1, (0, 0), 1), Predict(2, (1, 0)), Compute(3, graph="unguided")),
    coefficients=np.zeros((STEPS, 1, 2), np.float32),
)


@pytest.mark.parametrize(
    "program",
    [make_program(target_timesteps=SIGMAS[1:]), PREDICTED, make_output_program()],
    ids=["forecast", "predict", "output"],
)
def test_a_file_keeps_everything(program):
    read = Program.from_json(json.loads(json.dumps(program.to_json())), program.arrays())
    assert read.digest() == program.digest()
    assert (read.instructions, read.key, read.cut, read.slots) == (
        program.instructions, program.key, program.cut, program.slots,
    )  # fmt: skip
    for name, array in program.arrays().items():
        assert np.array_equal(getattr(read, name), array)


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": ROWS * 2},
        {"rows_out": ROWS[[0, 0, 2, 2]]},
        {"timesteps": SIGMAS[:-1] * 1000},
        {"instructions": (*MOVES[:2], Compute(2, 1, VELOCITY, "unguided"), MOVES[3])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_digest_sees_every_change(changes):
    assert make_output_program(**changes).digest() != make_output_program().digest()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("key"), "does not read as a program: KeyError"),
        (lambda data: data["key"].pop("sigmas_hash"), "does not read as a program"),
        (lambda data: data["key"].update(colour="red"), r"the key says \['colour'\], which this cachec does not know"),
        (lambda data: data["key"].update(batch="x" * 9999), "its key says 'xxx.* where int belongs"),
        (lambda data: data.update(colour="red"), r"the file says \['colour'\]"),
        (
            lambda data: data["instructions"][0].update(op="guess"),
            "no instruction 'guess'; known are compute, compute-positive, forecast",
        ),
        (lambda data: data["instructions"][0].update(op=[]), "does not read as a program"),
        (lambda data: data["instructions"][0].pop("step"), "does not read as a program"),
        (lambda data: data["instructions"][0].update(step="0"), "does not read as an instruction"),
        (lambda data: data["instructions"][0].update(branch="unconditional"), r"instruction 'compute' says \['branch'\]"),
        (lambda data: data["instructions"].append("text"), "does not read as a program"),
        (lambda data: data.update(cut="output"), r"expected float32\[4, 1, 0\]"),
        (lambda data: data.update(cut="x" * 9999), "cut 'xxx"),
        (lambda data: data["instructions"][0].update(op="x" * 9999), "no instruction 'xxx"),
    ],
)
def test_a_file_that_is_no_program_is_refused_in_a_short_message(damage, message):
    data = json.loads(json.dumps(make_program().to_json()))
    damage(data)
    with pytest.raises(BundleError, match=message) as caught:
        Program.from_json(data, make_program().arrays())
    assert len(str(caught.value)) < 400
