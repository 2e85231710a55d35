import math

import numpy as np
import pytest

from cachec.compiler.calibration.metrics import latent_rel_l2, mean, psnr_db, ssim


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
