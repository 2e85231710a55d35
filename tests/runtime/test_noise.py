import numpy as np
import pytest

from cachec.runtime.errors import InputError
from cachec.runtime.noise import GENERATOR, make_noise

FIRST_NUMBERS_OF_SEED_0 = [1.1176220178604126, -1.3871248960494995, -0.4265716075897217, -0.8035872578620911]


def test_noise_is_standard_normal_float32():
    noise = make_noise(3, (64, 64))
    assert noise.dtype == np.float32
    assert noise.shape == (64, 64)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_a_seed_always_means_the_same_noise():
    assert np.array_equal(make_noise(7, (6, 8)), make_noise(7, (6, 8)))
    assert not np.array_equal(make_noise(7, (6, 8)), make_noise(8, (6, 8)))


def test_noise_of_a_seed_is_pinned():
    assert GENERATOR == "numpy.PCG64.standard_normal"
    np.testing.assert_allclose(make_noise(0, (4,)), FIRST_NUMBERS_OF_SEED_0, rtol=1e-6)


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed is -1"):
        make_noise(-1, (2,))
