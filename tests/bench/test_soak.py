"""The soak's own bookkeeping."""

import json

import pytest

from bench import soak, soak_kills, soak_requests
from bench.soak_cases import EDITS, Case, Kind, Stage, head_of, same

pytest.importorskip("diffusers")


def test_kills_that_went_wrong_are_still_wrong_when_it_goes_on(tmp_path):
    said = [[0, "killed, whole; gone on"], [1, "compile: left half of it"], [2, "done before it was killed"]]
    (tmp_path / "kills.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (tmp_path / "folder").mkdir()
    found = soak_kills.run(3, tmp_path / "folder", tmp_path)
    assert found["wrong"] == [said[1]]
    assert found["outcomes"] == {"killed, whole; gone on": 1, "wrong": 1, "done before it was killed": 1}


def test_what_is_changed_is_another_request_and_all_kinds_and_stages_are_there():
    cases = [Case(number, ["uncached", "default"], edits=True) for number in range(3000)]
    assert {case.kind for case in cases} == set(Kind)
    assert {case.stage for case in cases if case.kind is Kind.LEAVES} == set(Stage)
    for case in cases:
        if case.kind is Kind.CHANGED:
            head, _, body = case.unchanged.partition(b"\r\n\r\n")
            assert not case.data.startswith(head + b"\r\n\r\n" + body)
            as_before = case.data[: case.head] == head_of(case.path, case.content_type, len(case.body))
            assert not (as_before and same(body, case.body, case.path == EDITS))
    assert same(b'{"n": 1}', b'{ "n":1}', False)
    assert not same(b'{"n": 1}', b'{"n": true}', False)


@pytest.mark.parametrize(("last", "after", "missed"), [(104, 17, []), (106, 17, ["memory"]), (100, 18, ["1 files more"])])
def test_memory_and_files_have_marks_which_the_page_says(last, after, missed):
    left = {"memory": [100_000_000, last * 1_000_000], "open": [17, after]}
    assert [what.startswith(begin) for what, begin in zip(soak_requests.missed(left), missed, strict=True)] == [True] * len(
        missed
    )
    row = {"cases": 2, "outcomes": {"the right picture": 2}, "wrong": [], "left": left}
    page = soak.table({"requests": row}, {"cpu": "a CPU", "cores": 2, "date": "today"})
    assert f"{last}.0 MB after the last: +{last - 100}.0% (mark: 5% more at most)" in page
