"""Workers as processes: the same results as of one, also when one of them is killed at work."""

import pytest
from toy_workers import FormulaRecorder, check_death

from cachec.compiler.calibration.processes import ProcessCrew
from cachec.compiler.calibration.workers import Place, at_work
from cachec.runtime.errors import EngineError, InputError

ONE = ProcessCrew((Place("cpu"),))
TWO = ProcessCrew((Place("cpu"), Place("cpu")))  # a user gives two devices


def test_what_a_killed_process_had_is_done_by_the_other(tmp_path, caplog):
    with at_work(TWO, FormulaRecorder(mark=tmp_path / "died")) as recorders:
        check_death(recorders, tmp_path)
    assert "was killed by SIGKILL: its prompts go to the other" in caplog.text


def test_what_a_process_cannot_open_is_said_here():
    with pytest.raises(InputError, match="no such model"), at_work(ONE, FormulaRecorder(refused="no such model")):
        pass


def test_the_last_ones_death_is_the_end(tmp_path):
    with (
        pytest.raises(EngineError, match=r"the last one, cpu \(process \d+\), was killed by SIGKILL"),
        at_work(ONE, FormulaRecorder(mark=tmp_path / "died")) as recorders,
    ):
        check_death(recorders, tmp_path)
    assert len(list((tmp_path / "work").iterdir())) == 1  # what it had finished
