import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from toy_evaluation import (
    LEVEL,
    MOVES,
    SCHEDULE,
    SIGMAS,
    STEPS,
    hidden_program,
    made_up_evaluation,
    output_program,
    uncached_program,
)

from cachec.compiler.evaluation.error_by_step import ErrorCurve
from cachec.compiler.evaluation.plots import (
    coefficients_of,
    place_labels,
    plot_coefficients,
    plot_errors,
    plot_quality,
    plot_schedules,
    row_styles,
    spread,
)
from cachec.compiler.methods.taylor import Taylor

EVALUATION = made_up_evaluation()
NAMES = (LEVEL, "taylor:1", "plain")


def texts(drawn):
    return [node.text for node in ElementTree.fromstring(drawn).iter("text")]


def hints(drawn):
    return [node.find("title").text for node in ElementTree.fromstring(drawn).iter("g") if node.find("title") is not None]


def test_a_row_looks_the_same_everywhere_and_like_no_other():
    styles = row_styles(EVALUATION.rows)
    assert list(styles) == list(NAMES)
    assert len({style.colour for style in styles.values()}) == 3
    assert [style.weight for style in styles.values()] == ["bold", "normal", "normal"]


def test_quality_names_every_row_with_its_tail():
    drawn = plot_quality(EVALUATION.rows)
    assert {*NAMES, "uncached, 0.5 s"} <= set(texts(drawn))
    assert f"{LEVEL}: 46.00 dB (5th percentile 45.0, worst 45.0) in 0.1 s" in hints(drawn)
    assert "diffusers" not in texts(drawn)


@pytest.mark.parametrize("seconds", [1.0, 1.7, 0.0099, 1234.0])
def test_the_axis_of_seconds_has_a_tick_however_near_the_values_are(seconds):
    rows = [{**row, "seconds_loop": seconds} for row in EVALUATION.rows]
    labels = [text for text in texts(plot_quality(rows)) if text.replace(".", "").isdigit()]
    assert any(seconds / 1.25 <= float(text) <= seconds * 1.25 for text in labels)


def test_quality_of_equal_rows_only_is_empty_but_there():
    drawn = plot_quality([row for row in EVALUATION.rows if row["kind"] == "uncached"])
    assert "uncached, 0.5 s" in texts(drawn)
    assert hints(drawn) == []


def test_errors_end_with_their_names():
    drawn = plot_errors(EVALUATION.errors, EVALUATION.rows, STEPS)
    assert set(NAMES) <= set(texts(drawn))
    assert sorted(hints(drawn)) == sorted(NAMES)
    assert plot_errors({LEVEL: ErrorCurve((1.0,), (0.0,))}, EVALUATION.rows, STEPS)  # no error at all


def test_schedules_that_are_equal_share_a_strip():
    programs = {name: EVALUATION.programs[name] for name in NAMES}
    drawn = plot_schedules({**programs, "every": uncached_program()}, SIGMAS)
    assert {", ".join(NAMES), "5 computed", "every", "10 computed"} <= set(texts(drawn))
    assert hints(drawn) == [f"step {step}" for step in (*SCHEDULE.compute, *range(STEPS))]


def test_coefficients_are_by_computed_step_on_both_cuts():
    found = coefficients_of(hidden_program())
    assert found.steps == SCHEDULE.forecast
    table = Taylor(1).table(SCHEDULE, SIGMAS, None).rows[list(found.steps)]
    np.testing.assert_allclose(np.nan_to_num(found.values[0]), table, atol=1e-6)
    moved = coefficients_of(output_program())
    assert moved.steps == moved.sources == SCHEDULE.compute
    np.testing.assert_allclose(np.nan_to_num(moved.values[0]), MOVES, atol=1e-6)


def test_a_heat_map_says_every_weight_that_is_read():
    drawn = plot_coefficients("level", output_program())
    assert len(hints(drawn)) == 15
    assert "step 8: -0.2000 of step 0" in hints(drawn)
    assert plot_coefficients("level", uncached_program()) == ""


def test_every_group_has_a_map_of_its_own():
    program = output_program()
    rows = {
        name: np.concatenate([value, 2 * value], axis=1)
        for name, value in program.arrays().items()
        if name in ("coefficients", "rows_out")
    }
    drawn = plot_coefficients("level", replace(program, **rows))
    assert {"group 0: step 8: -0.2000 of step 0", "group 1: step 8: -0.4000 of step 0"} <= set(hints(drawn))
    assert len(hints(drawn)) == 30


def test_labels_cover_neither_each_other_nor_marks():
    rng = np.random.default_rng(0)
    spots = [(100 + 10 * float(rng.random()), 100 + 80 * float(rng.random())) for _ in range(12)]
    marks = [(x - 7, y - 20, x + 7, y + 20) for x, y in spots]
    places = place_labels([60.0] * 12, marks, (16, 370), right=800)
    boxes = [(x, y - 7, x + 60, y + 7) for x, y in places]
    for i, a in enumerate(boxes):
        for b in [*boxes[i + 1 :], *marks]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_spread_keeps_order_and_distance():
    places = spread([10, 11, 12, 300], gap=15, low=0, high=300)
    assert places == sorted(places)
    assert min(np.diff(places)) >= 15
    assert max(places) <= 300
