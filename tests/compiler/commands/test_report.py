import json

import pytest
from toy_evaluation import LEVEL, MOVES, SCHEDULE, made_up_report

from cachec.compiler.commands.report import environment, render_report, report_bundle, report_json
from cachec.runtime.errors import InputError


def test_json_has_rows_programs_and_errors():
    data = json.loads(render_report(made_up_report(), ".json"))
    assert [row["name"] for row in data["rows"]] == [*data["programs"], "diffusers"]
    assert data["programs"][LEVEL]["computed"] == list(SCHEDULE.compute)
    assert data["programs"]["plain"]["coefficients"]["groups"][0][1] == [pytest.approx(MOVES[1, 0])] * 2 + [None] * 3
    assert data["errors_by_step"][LEVEL]["steps"] == [1.0, 5.0, 10.0]


def test_every_ending_has_its_format():
    report = made_up_report()
    assert render_report(report, ".html").startswith("<!doctype html>")
    assert render_report(report, ".md").startswith("# toy.cachec\n")
    assert report_json(report)["bundle"] == "toy.cachec"


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.htm.gz"])
def test_another_ending_is_refused_before_anything_is_measured(tmp_path, name):
    with pytest.raises(InputError, match=r"name it \.html, \.md or \.json"):
        report_bundle(tmp_path / "none", tmp_path / name, pictures=1, force=False)


def test_the_machine_is_named():
    assert {name for name, _ in environment("ort")} == {"measured", "processor", "system", "versions"}
