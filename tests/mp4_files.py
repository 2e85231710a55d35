"""What is in an MP4 file, beside the frames that it was made of."""

import io

import numpy as np

LOSS = 6  # of 255 in the mean, by H.264 with halved colours; neighbours of a moving figure differ by more


def check_mp4(content, video, fps=None):
    """The file ``content`` has the frames ``video`` [F, H, W, 3], uint8, in their order."""
    import av

    with av.open(io.BytesIO(content)) as file:
        (stream,) = file.streams.video
        assert fps is None or float(stream.average_rate) == fps
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert np.shape(frames) == video.shape
    off = np.array([[np.abs(frame.astype(float) - other).mean() for other in video] for frame in frames])
    assert off.argmin(axis=1).tolist() == list(range(len(video)))
    assert off.diagonal().max() < LOSS
