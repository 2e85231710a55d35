"""Workers as processes: the same results as of one, also when one of them is killed at work."""

import numpy as np
import pytest
from toy_workers import PROMPTS, ToyRecorder, record, toy_evaluator, toy_subject

from cachec.compiler.calibration.processes import ProcessCrew
from cachec.compiler.calibration.runs import recording_here
from cachec.compiler.calibration.workers import Place, at_work
from cachec.runtime.errors import InputError

TWO = ProcessCrew((Place("cpu"), Place("cpu")))  # of two devices there would be one each


def test_a_killed_process_is_replaced_by_the_other_and_results_are_those_of_one(tmp_path, caplog):
    with at_work(TWO, ToyRecorder(mark=tmp_path / "died")) as recorders:
        made = record(recorders, tmp_path / "work")
        assert recorders.size == 1
    assert (tmp_path / "died").exists()
    assert "was killed by SIGKILL: its prompts go to the other" in caplog.text
    alone = record(recording_here(toy_subject(), toy_evaluator()), None)
    assert made.keys() == alone.keys()
    assert len(made["final"]) == len(PROMPTS)
    for name, values in alone.items():
        np.testing.assert_allclose(made[name], values, atol=1e-6)
    again = record(recording_here(toy_subject(), None), tmp_path / "work")  # one process goes on from what they left
    np.testing.assert_array_equal(again["final"], made["final"])


def test_what_a_process_cannot_open_is_said_here():
    with (
        pytest.raises(InputError, match="no such model"),
        at_work(ProcessCrew((Place("cpu"),)), ToyRecorder(refused="no such model")),
    ):
        pass
