"""The soak's own bookkeeping."""

import json

import pytest

from bench import soak_kills

pytest.importorskip("diffusers")


def test_kills_that_went_wrong_are_still_wrong_when_it_goes_on(tmp_path):
    said = [[0, "killed, whole; gone on"], [1, "compile: left half of it"], [2, "done before it was killed"]]
    (tmp_path / "kills.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (tmp_path / "folder").mkdir()
    found = soak_kills.run(3, tmp_path / "folder", tmp_path)
    assert found["wrong"] == [said[1]]
    assert found["outcomes"] == {"killed, whole; gone on": 1, "wrong": 1, "done before it was killed": 1}
