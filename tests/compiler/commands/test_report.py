"""Reports of evaluations that were made up: rendering, escaping, self-containedness, plots."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from cachec.compiler.commands.report import render_report, report_bundle
from cachec.compiler.evaluation.error_by_step import ErrorCurve
from cachec.compiler.evaluation.evaluate import FINE, Evaluation, KeptPrompt
from cachec.compiler.evaluation.plots import (
    coefficients_of,
    place_labels,
    plot_coefficients,
    plot_errors,
    plot_quality,
    plot_schedules,
)
from cachec.compiler.evaluation.summary import Measurements, summarize
from cachec.compiler.evaluation.svg import Axis, Svg, spread, text_width
from cachec.compiler.evaluation.words import HEADER, Report, format_table, headline
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.lower import lower_advance, lower_table, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import ProgramKey, hash_sigmas

STEPS = 10
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
KEY = ProgramKey(STEPS, hash_sigmas(SIGMAS), height=8, width=8, text_tokens=1)
SCHEDULE = Schedule(STEPS, (0, 1, 2, 5, 8))
PROMPT = "<script>alert('x')</script> & \"quotes\" | bars"


def hidden_program():
    return lower_table(Taylor(1).table(SCHEDULE, SIGMAS, None), KEY, SIGMAS, SIGMAS[:-1])


def uncached_program():
    return lower_uncached(KEY, SIGMAS, SIGMAS[:-1])


def output_program():
    rows = np.tril(-np.ones((5, 5)) / 5)
    return lower_advance(AdvanceTable(SCHEDULE, rows), KEY, SIGMAS, SIGMAS[:-1])


def measurements(psnr, seconds, *, probed=True):
    return Measurements(
        psnr=psnr,
        psnr_fine=[40.0, 42.0],
        ssim=[0.99, 1.0],
        latent_error=[0.01, 0.02],
        loop_seconds=seconds,
        total_seconds=seconds,
        attributes={"colour": [1.0, 0.5], "shape": [1.0, 1.0]} if probed else {},
    )


def made_up_evaluation(*, kept=True, probed=True):
    results = {
        "uncached": measurements([np.inf, np.inf], [0.5, 0.5], probed=probed),
        "fast": measurements([45.0, 47.0], [0.1, 0.1], probed=probed),
        "taylor:1": measurements([44.0, 46.0], [0.1, 0.12], probed=probed),
        "plain": measurements([44.5, 46.5], [0.1, 0.1], probed=probed),
        "diffusers": measurements([140.0, 141.0], [1.0, 1.0], probed=probed),
    }
    kinds = {"uncached": "uncached", "fast": "level", "taylor:1": "method", "plain": "solver", "diffusers": "diffusers"}
    rows = tuple(summarize(name, kinds[name], 5, results) for name in results)
    setting = {
        "prompts": 2,
        "seed": 0,
        "level": "fast",
        "schedule": list(SCHEDULE.compute),
        "schedule_steps": STEPS,
        "steps": STEPS,
        "fine_steps": 200,
        "backend": "eager",
        "method": "taylor",
        "lpips": "not available: torchvision not installed",
        "probe": {"items": 3, "prompts_skipped": 1} if probed else None,
    }
    hidden = hidden_program()
    programs = {"uncached": uncached_program(), "fast": hidden, "taylor:1": hidden, "plain": output_program()}
    names = [*results, FINE]
    picture = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    one = KeptPrompt(
        PROMPT,
        0,
        dict.fromkeys(names, picture),
        dict.fromkeys(names, 45.0) | {"uncached": np.inf},
        dict.fromkeys(names, 0.1),
    )
    errors = {name: ErrorCurve((1.0, 5.0, 10.0), (0.0, 1e-3, 1e-2)) for name in ("fast", "taylor:1", "plain")}
    return Evaluation(rows, setting, programs, (one,) if kept else (), errors if kept else {})


def made_up_report(**changes):
    return Report("toy.cachec", made_up_evaluation(**changes), [("method", "taylor"), ("", "##")], [("processor", "none")])


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs


def test_the_page_is_one_file_without_scripts():
    page = render_report(made_up_report(), ".html")
    tags = Tags(page)
    assert not {"script", "link", "iframe", "object"} & set(tags.found)
    assert not re.search(r"https?://|url\(|@import", page)
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(name.startswith("on") for name, _ in tags.attributes)


def test_prompts_are_escaped():
    page = render_report(made_up_report(), ".html")
    assert PROMPT not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page


def test_the_page_has_every_part():
    page = render_report(made_up_report(), ".html")
    for part in ("Pictures", "Table", "PSNR against seconds", "Error by step", "Schedule", "Coefficients", "Settings"):
        assert f"<h2>{part}" in page
    assert all(name in page.replace("\u00a0", " ") for name in HEADER)
    assert page.count("<svg") == 4


def test_a_page_without_pictures_leaves_these_parts_out():
    page = render_report(made_up_report(kept=False), ".html")
    assert "<h2>Pictures" not in page
    assert "<h2>Error by step" not in page
    assert "<img" not in page


def test_markdown_and_json_have_the_same_rows():
    report = made_up_report()
    text, data = render_report(report, ".md"), json.loads(render_report(report, ".json"))
    assert headline(report) in text
    assert [row["name"] for row in data["rows"]] == [*data["programs"], "diffusers"]
    for row in data["rows"]:
        assert row["name"] in text
    assert data["programs"]["fast"]["computed"] == list(SCHEDULE.compute)
    assert data["errors_by_step"]["fast"]["steps"] == [1.0, 5.0, 10.0]
    assert len(data["rows"][1]["psnr_db_by_prompt"]) == 2


def test_the_headline_is_of_the_compared_level():
    assert headline(made_up_report()).startswith("5.0 times as fast as the uncached loop, at 46.0 dB")


def test_the_table_says_plainly_what_is_not_available():
    table = format_table(made_up_evaluation(probed=False))
    assert "LPIPS: not available: torchvision not installed." in table
    assert "Attributes: not available" in table
    assert "1 prompt skipped" in format_table(made_up_evaluation())


def test_attributes_are_shares_of_items():
    row = made_up_evaluation().rows[1]
    assert row["attributes"] == {"colour": 0.75, "shape": 1.0}
    assert row["attribute_accuracy"] == 0.875


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.htm.gz"])
def test_another_ending_is_refused_before_anything_is_measured(tmp_path, name):
    with pytest.raises(InputError, match=r"name it \.html, \.md or \.json"):
        report_bundle(tmp_path / "none", tmp_path / name, pictures=1, force=False)


def test_coefficients_are_by_computed_step_on_both_cuts():
    found = coefficients_of(hidden_program())
    assert found.steps == SCHEDULE.forecast
    table = Taylor(1).table(SCHEDULE, SIGMAS, None).coefficients[list(found.steps)]
    np.testing.assert_allclose(np.nan_to_num(found.values), table, atol=1e-6)
    moved = coefficients_of(output_program())
    assert moved.steps == moved.sources == SCHEDULE.compute
    np.testing.assert_allclose(np.nan_to_num(moved.values), np.tril(-np.ones((5, 5)) / 5), atol=1e-6)


def test_plots_are_well_formed():
    evaluation = made_up_evaluation()
    drawn = [
        plot_quality(evaluation.rows),
        plot_errors(evaluation.errors, evaluation.rows, STEPS),
        plot_schedules(evaluation.programs, SIGMAS),
        plot_coefficients(hidden_program()),
        plot_coefficients(output_program()),
    ]
    for text in drawn:
        ElementTree.fromstring(text)
    assert plot_coefficients(uncached_program()) == ""


def test_quality_plot_of_equal_rows_only_is_empty_but_there():
    rows = [row for row in made_up_evaluation().rows if row["kind"] == "uncached"]
    drawn = ElementTree.fromstring(plot_quality(rows))
    assert drawn.tag.endswith("svg")
    assert not any(node.tag.endswith("circle") for node in drawn.iter())


def test_labels_cover_neither_each_other_nor_spots():
    rng = np.random.default_rng(0)
    names = [f"method:{i}" for i in range(12)]
    spots = [(100 + 10 * float(rng.random()), 100 + 80 * float(rng.random())) for _ in names]
    places = place_labels(names, spots, top=16, bottom=370)
    boxes = [(x, y - 7, x + text_width(n), y + 7) for n, (x, y) in zip(names, places, strict=True)]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in spots)


def test_spread_keeps_order_and_distance():
    places = spread([10, 11, 12, 300], gap=15, low=0, high=300)
    assert places == sorted(places)
    assert min(np.diff(places)) >= 15
    assert max(places) <= 300


@pytest.mark.parametrize("axis", [Axis(0, 50, 0, 100), Axis(41.3, 48.2, 100, 0), Axis(1e-4, 0.1, 100, 0, log=True)])
def test_ticks_lie_inside_the_axis(axis):
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 12
    assert all(min(axis.start, axis.end) - 1e-6 <= axis(tick) <= max(axis.start, axis.end) + 1e-6 for tick in ticks)


def test_svg_escapes_text():
    picture = Svg(10, 10, "<a> & b")
    picture.text(1, 1, PROMPT)
    picture.rect(0, 0, 1, 1, fill='"red"', hint="<x>")
    drawn = ElementTree.fromstring(picture.render())
    assert PROMPT in [node.text for node in drawn.iter()]
