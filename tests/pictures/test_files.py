import io

import numpy as np
import pytest
from PIL import Image

from cachec.pictures.files import to_mp4, to_png


def test_a_picture_survives():
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(to_png(picture)))), picture)


def test_a_video_is_an_animated_png():
    video = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    with Image.open(io.BytesIO(to_png(video))) as image:
        assert image.n_frames == 3
        image.seek(2)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), video[2])


def test_a_video_is_an_mp4_of_its_frames():
    av = pytest.importorskip("av")
    video = np.zeros((5, 18, 31, 3), np.uint8)
    video[3:, :, :16] = (255, 0, 0)
    with av.open(io.BytesIO(to_mp4(video, 12.5))) as file:
        (stream,) = file.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert float(stream.average_rate) == 12.5
    assert (len(frames), frames[0].shape) == (5, (18, 32, 3))
    assert np.abs(frames[4][:, :12].astype(int) - (255, 0, 0)).max() < 40
    assert frames[0].max() < 20
