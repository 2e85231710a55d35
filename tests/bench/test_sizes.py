"""A model of real width is compiled without being held in memory."""

import pytest

sizes = pytest.importorskip("bench.sizes", reason="the source tree is not beside the tests")


@pytest.mark.slow
def test_compiling_takes_less_memory_than_the_weights_and_their_copy(tmp_path):
    row = sizes.Row("one of each", (1, 1), {**sizes.BASE, **sizes.LARGE, "dtype": "bfloat16"})
    (result,) = sizes.measure([row], tmp_path)
    assert result.stored_bytes == 1_091_096_192
    assert result.compiled["bundle_bytes"] > result.stored_bytes
    assert result.compiled["peak_rss"] < 1.6e9  # PyTorch, diffusers and the largest weights; the model would be 1.1e9 more
    assert not (tmp_path / "bundle.cachec").exists()


def test_the_page_has_a_row_each_and_the_law_of_those_meant_for_it():
    compiled = {"seconds": 60.0, "stages": {"graphs": 30.0}, "bundle_bytes": 10**9}
    some = [row for row in sizes.ROWS if row.law]
    results = [
        sizes.Result(
            row.name,
            row.blocks,
            "bfloat16",
            10**9 * (1 + number),
            {**compiled, "seconds": 20.0 * number, "peak_rss": 10**9 + 10**8 * number},
            {},
        )
        for number, row in enumerate(some)
    ]
    fitted = sizes.law(results, sizes.ROWS)
    assert fitted["seconds_per_gb"] == pytest.approx(20)
    assert fitted["rss_gb_per_gb"] == pytest.approx(0.1)
    page = sizes.markdown(results, fitted)
    assert all(f"| {row.name} | bfloat16 |" in page for row in some)
    assert "seconds = -20 + 20.0 W, memory = 0.90 GB + 100 MB W" in page
    assert sizes.law(results[:1], sizes.ROWS) == {}
