"""Where requests begin that have a picture, and files of pictures."""

import io

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image

from cachec.pictures.beginning import Beginning, check_pictures, start_of
from cachec.pictures.files import read_picture, to_png
from cachec.runtime.errors import InputError

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def file(picture=PICTURE, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_step_is_where_diffusers_begins():
    class Pipeline:
        scheduler = FlowMatchEulerDiscreteScheduler()

    for steps in (1, 3, 28, 50):
        Pipeline.scheduler.set_timesteps(steps)
        for strength in (0.01, 0.3, 0.55, 0.6, 0.7, 0.9, 1.0):
            _, left = FluxImg2ImgPipeline.get_timesteps(Pipeline, steps, strength, "cpu")
            assert start_of(strength, steps) == steps - left
    assert start_of(None, 50) == start_of(0.6, 50) == 20
    for strength in (0.0, 1.1, float("nan"), -1):
        with pytest.raises(InputError, match="strength is .*must be above 0"):
            start_of(strength, 50)


def test_noise_is_mixed_in_as_a_flow_has_it():
    noise, latents, sigmas = np.ones((2, 3), np.float32), np.full((1, 3), 5, np.float32), np.float32([1, 0.25, 0])
    assert Beginning().mixed(noise, sigmas) is noise
    made = Beginning(1, latents).mixed(noise, sigmas)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, np.full((2, 3), 4))
    np.testing.assert_array_equal(Beginning(0, latents).mixed(noise, sigmas), noise)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (PICTURE[None].astype(float), r"pictures are float64\[1, 4, 6, 3\]; of 6x4 they are uint8\[B, 4, 6, 3\]"),
        (PICTURE.swapaxes(0, 1)[None], r"uint8\[1, 6, 4, 3\]"),
        (PICTURE[None], "1 pictures for 2 prompts"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(pictures, message):
    with pytest.raises(InputError, match=message):
        check_pictures(pictures, "6x4", 2)


def test_files_are_read_as_they_are_to_be_seen():
    np.testing.assert_array_equal(read_picture(to_png(PICTURE), ["8x8", "6x4"]), PICTURE)
    np.testing.assert_array_equal(read_picture(file(kind="WEBP", lossless=True), ["6x4"]), PICTURE)
    turned = Image.Exif()
    turned[0x112] = 6  # a quarter to the right
    made = read_picture(file(exif=turned), ["4x6"])
    np.testing.assert_array_equal(made, np.rot90(PICTURE, -1))
    assert read_picture(file(PICTURE[:, :, 0]), ["6x4"]).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no PNG, JPEG, WEBP that can be read"),
        (file()[:-30], "no PNG, JPEG, WEBP that can be read"),
        (file(kind="GIF"), "no PNG, JPEG, WEBP that can be read"),
        (file(), "the picture is 6x4, and wanted is 64x64, 32x64: scale or crop it"),
    ],
    ids=str,
)
def test_other_files_are_refused(content, message):
    with pytest.raises(InputError, match=message):
        read_picture(content, ["64x64", "32x64"] if "wanted" in message else ["6x4"])
