import numpy as np
from PIL import Image

from cachec.compiler.evaluation.pictures import MARGIN, Cell, draw_sheet, to_image, write_png


def test_floats_become_bytes_and_do_not_wrap():
    pixels = np.asarray(to_image(np.array([[[-0.5, 0.5, 1.5]]])))
    assert pixels.tolist() == [[[0, 128, 255]]]


def test_a_picture_on_disk_is_the_picture(tmp_path):
    picture = np.random.default_rng(0).random((4, 6, 3))
    write_png(to_image(picture), tmp_path / "a.png")
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "a.png")) / 255, picture, atol=1 / 255)


def test_a_sheet_has_a_row_for_each_prompt_and_enlarges_small_pictures():
    cell = Cell(np.zeros((100, 100, 3)), ("name", "a line that is much too long for the width of its cell, and is cut"))
    one, two = draw_sheet([("a prompt", [cell])]), draw_sheet([("a prompt", [cell, cell])] * 2)
    assert one.width == 300 + 2 * MARGIN
    assert two.width == 2 * 300 + 3 * MARGIN
    assert two.height - MARGIN == 2 * (one.height - MARGIN)
    black = np.asarray(one.convert("L")) == 0
    assert black.sum() >= 300 * 300
    assert not black[:, : MARGIN - 1].any()


def test_videos_stand_under_each_other_with_frames_in_a_row():
    video = np.zeros((25, 96, 64, 3))
    video[24] = 1
    cell = Cell(video, ("name", "8 steps"))
    one, two = draw_sheet([("a prompt", [cell])]), draw_sheet([("a prompt", [cell, cell])])
    assert one.width == two.width == 9 * 64 + 2 * MARGIN
    grey = np.asarray(two.convert("L"))
    for top in (2 * MARGIN + 15, 2 * MARGIN + 15 + two.height - one.height):
        row = grey[top + 20, MARGIN:-MARGIN]
        assert not row[: 8 * 64].any()
        assert (row[8 * 64 :] == 255).all()
