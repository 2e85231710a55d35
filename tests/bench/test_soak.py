"""The soak's own bookkeeping."""

import json
from pathlib import Path

import pytest

from bench import soak, soak_bundles, soak_kills, soak_requests
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
    row = {"revision": soak.CASES["requests"], "cases": 2, "outcomes": {"the right picture": 2}, "wrong": [], "left": left}
    page = soak.table({"requests": row}, {"cpu": "a CPU", "cores": 2, "date": "today"})
    assert f"{last}.0 MB after the last: +{last - 100}.0% (mark: 5% more at most)" in page


def test_figures_of_an_earlier_campaign_are_called_so_until_the_part_is_played_anew(tmp_path, monkeypatch):
    page, says = tmp_path / "page.md", tmp_path / "soak.json"
    monkeypatch.setattr(soak, "PAGE", page)
    monkeypatch.setattr(soak, "SAYS", says)
    monkeypatch.chdir(tmp_path)
    page.write_text(f"What is done.\n\n{soak.BEGIN}\n\nOld figures.\n")
    row = {"cases": 2, "outcomes": {"refused": 2}, "wrong": []}
    says.write_text(json.dumps({"parts": {"files": {"revision": soak.CASES["files"] - 1, **row}}}))
    soak.keep("manifests", row, Path("soak.json"))  # the same file by another path
    text = page.read_text()
    assert text.startswith(f"What is done.\n\n{soak.BEGIN}\n\n`make soak`")
    assert "cases were others than those described above: `files`." in text
    assert "| manifests | 2 | refused 2 | 0 |" in text
    assert "Old" not in text
    soak.keep("files", row, says)
    assert "earlier campaign" not in page.read_text()


def test_cases_of_self_contained_bundles_are_of_all_kinds():
    cases = range(0, soak.PARTS["files"], soak_bundles.EVERY)
    assert {case % 2 for case in cases} == {0, 1}, "by it files are large"
    assert {case % 3 for case in cases} == {0, 1, 2}, "by it a manifest fits"


def test_the_page_says_what_the_file_says():
    kept = json.loads(soak.SAYS.read_text())
    assert soak.PAGE.read_text().endswith(soak.table(kept["parts"], kept["where"]))
