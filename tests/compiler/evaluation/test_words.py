from toy_evaluation import LEVEL, made_up_evaluation, made_up_report

from cachec.compiler.evaluation.words import HEADER, format_table, headline, render_markdown, table_cells


def test_the_headline_is_of_the_compared_level_and_names_the_worst():
    assert headline(made_up_report()).startswith(
        "5.0 times as fast as the uncached loop, at 46.0 dB PSNR from its pictures (worst 45.0)"
    )


def test_a_row_shows_the_tail_beside_the_mean():
    row = next(row for row in made_up_evaluation().rows if row["name"] == LEVEL)
    cells = table_cells(row)
    assert len(cells) == len(HEADER)
    assert cells[:5] == [LEVEL, "5", "46.00 ± 1.00", "45.0", "45.0"]
    uncached = made_up_evaluation().rows[0]
    assert table_cells(uncached)[2:5] == ["equal"] * 3


def test_the_table_says_plainly_what_is_not_available():
    table = format_table(made_up_evaluation(probed=False))
    assert "LPIPS: not available: torchvision not installed." in table
    assert "Attributes: not available" in table
    assert "1 prompt skipped" in format_table(made_up_evaluation())


def test_markdown_has_every_row_and_schedule():
    report = made_up_report()
    text = render_markdown(report)
    assert headline(report) in text
    for row in report.evaluation.rows:
        assert f"| {row['name']} |" in text.replace("**", "")
    assert "- uncached computes all of 10 steps" in text
    assert f"- {LEVEL} computes 0, 1, 2, 5, 8 of 10 steps" in text
