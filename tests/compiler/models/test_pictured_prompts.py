"""Prompts that begin with a picture."""

import pytest
from PIL import Image

from cachec.compiler.models.pictured_prompts import on_pictures_of, read_pictured
from cachec.runtime.errors import InputError


def test_a_prompt_is_a_picture_and_what_is_to_become_of_it(tmp_path):
    Image.new("L", (6, 4), 200).save(tmp_path / "a.png")
    prompt = f" [{tmp_path / 'a.png'}] make it\nred"
    texts, (picture,) = read_pictured([prompt], 32, 16)
    assert texts == ["make it\nred"]
    assert (picture.size, picture.mode) == ((32, 16), "RGB")
    assert on_pictures_of([prompt], [""]) == [f"[{tmp_path / 'a.png'}] "]


def test_what_is_wrong_with_a_picture_is_said(tmp_path):
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(
        InputError, match=r"prompt 'make it red' names no picture to start from: begin with its file in brackets"
    ):
        read_pictured(["make it red"], 8, 8)
    with pytest.raises(InputError, match=r"b.png is no picture that can be read"):
        read_pictured([f"[{tmp_path / 'b.png'}] x"], 8, 8)
    with pytest.raises(InputError, match=r"picture .*c.png cannot be read: No such file"):
        read_pictured([f"[{tmp_path / 'c.png'}] x"], 8, 8)
