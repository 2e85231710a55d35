"""Figures of the quality page: what is said to be better, and by what; schedules of one branch at equal work."""

import numpy as np
import pytest

from bench.quality_caches import CACHES
from bench.quality_distilled import COSTS, disca_name, distilled_section
from bench.quality_methods import EQUAL, LESS_OWN, LESS_SEARCHED, METHODS, OWN, SEARCHED
from bench.quality_report import claims, model_section
from bench.quality_setting import AbsentError, Rows
from bench.quality_tables import Found, compared, difference, low, verdict
from bench.quality_transfer import one_branch_schedules
from cachec.runtime.errors import InputError

CAPTIONS = 128


def row(psnr, computed=8):
    psnr = np.asarray(psnr, float)
    error = 10 ** (-psnr / 20)
    values = {"psnr": psnr.tolist(), "ssim": (1 - error).tolist(), "latent": error.tolist()}
    return {**values, "computed": computed, "work": float(computed), "steps": list(range(computed)), "seconds": 1.0}


@pytest.fixture
def spread():
    return np.random.default_rng(0).normal(50, 5, CAPTIONS)


def test_a_mean_is_better_only_if_pairs_show_it(spread):
    noise = np.random.default_rng(1).normal(0, 1, CAPTIONS)
    above, level = row(spread + 1 + noise), row(spread + 0.05 * noise - 0.05 * noise.mean())
    assert difference(above, row(spread), "mean PSNR")[1] == "better"
    assert difference(row(spread), above, "mean latent error")[1] == "worse"  # where less is better
    assert "not shown" in difference(level, row(spread), "mean PSNR")[1]
    assert (verdict(above, row(spread)), verdict(row(spread), above)) == ("it is better", "it is worse")


def test_the_tail_is_compared_with_the_best_tail(spread):
    broken = spread + 6
    broken[:10] = 15  # best by the mean, worst by the tail
    measure, best, theirs, ours, _, shown = compared(
        row(spread + 1), [("a", "own", row(broken)), ("b", "own", row(spread))], "p5 of PSNR"
    )
    assert (measure, best, shown) == ("p5 of PSNR", "b, own", "better")
    assert float(ours) - float(theirs) == pytest.approx(1, abs=0.11)
    assert low(spread) in spread
    assert compared(row(spread + 1), [("a", "own", row(broken)), ("b", "own", row(spread))], "mean PSNR")[1] == "a, own"


def content(rows, name="small"):
    facts = {"model": name, "steps": 50, "width": "16", "height": "16", "guidance": "1.0", "captions": CAPTIONS}
    return Found({"facts": facts, "rows": rows})


def test_sentences_follow_the_figures(spread):
    rows = {f"{CACHES}|10|lesa|N = 7": row(spread, 10), f"{CACHES}|10|taylor:1|N = 7": row(spread + 2, 9)}
    assert "it is worse" in claims(content(rows))
    assert "+2.00" not in claims(content(rows))
    assert "it is better" in claims(content({**rows, f"{CACHES}|10|taylor:1|N = 7": row(spread - 2, 9)}))
    del rows[f"{CACHES}|10|lesa|N = 7"]
    assert "not measured yet" in claims(content(rows))


def test_what_is_not_measured_is_said(spread, tmp_path):
    rows = {f"{EQUAL}|8|ab2|uniform": row(spread), f"{EQUAL}|8|foca|own": {"missing": "it blows up", "seconds": 1, "made": "0"}}
    page = model_section(content(rows), tmp_path / "page.md")
    assert (tmp_path / "quality-small.png").is_file()
    assert page.count("Not measured yet.") == 5  # comparisons, two budgets, caches, transfer
    assert "it blows up" in page
    assert "--model small --part caches" in page
    assert "No student" in distilled_section(content(rows))
    absent = {"distilled|8|a student|R = 1": {"missing": "not distilled yet: `cachec distill`", "absent": True, "seconds": 0}}
    assert "`cachec distill`" in distilled_section(content(absent, "tiny-qwen"))


def test_rows_are_measured_once_and_of_one_model(tmp_path, capsys):
    rows = Rows(tmp_path / "rows.json", {"model": "small"})
    rows.measure(EQUAL, 8, "taylor:1", "own", lambda: row([40.0, 41.0]))
    again = Rows(tmp_path / "rows.json", {"model": "small"})
    again.measure(EQUAL, 8, "taylor:1", "own", lambda: pytest.fail("it is there"))
    assert again.steps(EQUAL, 8, "taylor:1", "own") == tuple(range(8))
    with pytest.raises(InputError, match="another --work"):
        Rows(tmp_path / "rows.json", {"model": "another"})
    again.forget(["taylor"])
    assert Rows(tmp_path / "rows.json", {"model": "small"}).rows == {}


def test_one_branch_alone_is_compared_at_equal_work():
    assert {schedule.work for schedule in one_branch_schedules(50).values()} == {8.0}


def test_names_of_rows_are_those_of_methods():
    assert {*OWN, *SEARCHED, *LESS_OWN, *LESS_SEARCHED} <= METHODS.keys()
    assert {*LESS_OWN} <= {*OWN}
    assert disca_name({"adversarial": 0}) == "disca, squared error alone"
    assert disca_name({"depth": 0}) == "disca, fusion without blocks"


def test_what_lacks_a_file_is_tried_again_and_what_breaks_off_stops_nothing(tmp_path):
    def lacks():
        raise AbsentError("not trained yet: `cachec train`")

    rows = Rows(tmp_path / "rows.json", {"model": "small"})
    rows.measure(CACHES, 10, "lesa", "N = 7", lacks)
    rows.measure(CACHES, 10, "reuse", "N = 7", lambda: row([30.0, 31.0])["none such"])
    rows.measure(CACHES, 10, "taylor:1", "N = 7", lambda: row([40.0, 41.0]))
    rows.measure(COSTS, 8, "disca", "a student", lambda: {"shares": {"small": 0.25}})
    assert rows.failed == [f"{CACHES}|10|reuse|N = 7"]
    again = Rows(tmp_path / "rows.json", {"model": "small"})
    assert again.rows.keys() == {f"{CACHES}|10|lesa|N = 7", f"{CACHES}|10|taylor:1|N = 7", f"{COSTS}|8|disca|a student"}
    assert "cachec train" in again.rows[f"{CACHES}|10|lesa|N = 7"]["missing"]
    again.measure(CACHES, 10, "lesa", "N = 7", lambda: row([50.0, 51.0], 10))
    assert len(again.steps(CACHES, 10, "lesa", "N = 7")) == 10
