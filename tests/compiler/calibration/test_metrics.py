import math

import numpy as np
import pytest

from cachec.compiler.calibration import metrics
from cachec.compiler.calibration.metrics import Lpips, find_lpips, latent_rel_l2, mean, psnr_db, ssim, summarize_metric
from cachec.runtime.errors import InputError


def test_psnr_is_that_of_floats_and_does_not_wrap():
    reference = np.zeros((16, 16, 3), np.float32)
    assert psnr_db(reference + 0.1, reference) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(reference + 1.0, reference) == pytest.approx(0.0, abs=1e-4)


def test_equal_pictures_have_infinite_psnr_which_means_leave_out():
    picture = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    assert psnr_db(picture, picture) == math.inf
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert mean([math.inf, math.inf]).value is None
    assert mean([30.0, math.inf]).value == 30.0


def test_mean_has_its_standard_error():
    result = mean([1.0, 2.0, 3.0])
    assert result.value == 2.0
    assert result.error == pytest.approx(1 / math.sqrt(3))


def test_latent_error_is_relative():
    x = np.ones((1, 4, 4))
    assert latent_rel_l2(1.1 * x, x) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("installed", "reason"), [(False, "torchmetrics and torchvision not installed: pip install"), (True, "no AlexNet weights")]
)
def test_lpips_without_its_code_or_weights_says_what_to_do_and_downloads_nothing(monkeypatch, tmp_path, installed, reason):
    monkeypatch.setattr(metrics, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lpips = find_lpips()
    assert lpips.distance(np.zeros((8, 8, 3)), np.ones((8, 8, 3))) is None
    assert reason in lpips.reason
    assert str(tmp_path) not in lpips.reason


def test_lpips_gets_pictures_channels_first():
    network = Lpips(lambda picture, reference: (picture - reference).abs().max() if picture.shape == (1, 3, 8, 9) else None)
    assert network.distance(np.full((8, 9, 3), 0.75), np.full((8, 9, 3), 0.5)) == pytest.approx(0.25)


def test_a_summary_has_the_mean_and_how_bad_it_gets():
    values = [float(v) for v in range(30, 70)]
    assert summarize_metric("psnr_db", values) == {
        "psnr_db": 49.5,
        "psnr_db_stderr": pytest.approx(np.std(values, ddof=1) / 40**0.5, abs=1e-3),
        "psnr_db_p5": 31.0,
        "psnr_db_min": 30.0,
    }
    assert summarize_metric("latent_error", [0.1, 0.3, 0.2]) == {
        "latent_error": 0.2,
        "latent_error_p95": 0.3,
        "latent_error_max": 0.3,
    }


def test_equal_pictures_are_left_out_of_the_mean_and_are_never_the_worst():
    assert summarize_metric("psnr_db", [math.inf, 40.0, 20.0]) == {
        "psnr_db": 30.0,
        "psnr_db_stderr": 10.0,
        "psnr_db_p5": 20.0,
        "psnr_db_min": 20.0,
    }
    assert set(summarize_metric("psnr_db", [math.inf, math.inf]).values()) == {None}
    with pytest.raises(InputError, match="picture 2 is not a number"):
        summarize_metric("ssim", [1.0, math.nan])
