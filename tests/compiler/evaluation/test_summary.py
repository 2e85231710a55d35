import math

from toy_evaluation import measured

from cachec.compiler.evaluation.summary import Measured, summarize

LOOPS = {"uncached": 0.5, "fast": 0.1, "diffusers": 1.0}


def test_a_row_has_means_tails_and_ratios():
    row = summarize("fast", "level", 5, [measured(45.0, 0.1), measured(47.0, 0.3)], LOOPS)
    assert (row["psnr_db"], row["psnr_db_stderr"], row["psnr_db_p5"], row["psnr_db_min"]) == (46.0, 1.0, 45.0, 45.0)
    assert {"psnr_db_fine", "psnr_db_fine_min", "ssim", "ssim_stderr", "ssim_p5", "ssim_min"} <= row.keys()
    assert (row["latent_error"], row["latent_error_p95"], row["latent_error_max"]) == (0.02, 0.02, 0.02)
    assert (row["speedup_vs_uncached"], row["speedup_vs_eager"], row["seconds_total"]) == (5.0, 10.0, 0.4)
    assert row["seconds_loop_quartiles"] == [0.15, 0.25]
    assert row["psnr_db_by_prompt"] == [45.0, 47.0]


def test_equal_pictures_have_no_decibels():
    row = summarize("uncached", "uncached", 10, [measured(math.inf, 0.5)] * 2, LOOPS)
    assert row["psnr_db"] is None is row["psnr_db_min"]
    assert row["psnr_db_by_prompt"] == [None, None]


def test_attributes_are_shares_of_what_prompts_state():
    both = Measured(45.0, 41.0, 1.0, 0.0, 0.1, 0.1, attributes={"mood": False, "hair": True})
    one = Measured(45.0, 41.0, 1.0, 0.0, 0.1, 0.1, attributes={"mood": True})
    silent = Measured(45.0, 41.0, 1.0, 0.0, 0.1, 0.1)
    row = summarize("fast", "level", 5, [silent, both, one], LOOPS)
    assert row["attributes"] == {"mood": 0.5, "hair": 1.0}
    assert row["attribute_accuracy"] == 0.6667


def test_what_is_not_available_is_none():
    row = summarize("fast", "level", 5, [measured(45.0, 0.1, probed=False)], LOOPS)
    assert row["lpips"] is None is row["attributes"] is row["attribute_accuracy"]
