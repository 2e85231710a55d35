"""Prompt lists: read however they were saved, disjoint by use, and made again the same."""

from itertools import combinations

import pytest

from cachec.compiler.calibration.prompts import DIRECTORY, default_prompts, read_prompts, split_prompts
from cachec.runtime.errors import InputError

USES = ("train", "measure", "eval")


def test_a_list_is_read_as_editors_save_it(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa café\r\n\r\n  a tree \r\na line\u2028separator\r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a café", "a tree", "a line\u2028separator"]


def test_another_encoding_and_an_empty_list_are_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes("a house\na café\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"prompts file .*p\.txt is not UTF-8: line 2 has a byte 0xe9"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\r\n \r\n")
    with pytest.raises(InputError, match="holds no prompt: write one prompt a line"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(("name", "sizes"), [("avatars", (128, 64, 128)), ("general", (32, 16, 16))])
def test_no_shipped_prompt_has_two_uses(name, sizes):
    lists = [default_prompts(name, use) for use in USES]
    assert tuple(map(len, lists)) == sizes
    assert all(len(set(prompts)) == len(prompts) for prompts in lists)
    assert not any(set(one) & set(other) for one, other in combinations(lists, 2))


@pytest.mark.parametrize("name", ["avatars", "clips"])
def test_lists_of_avatars_and_clips_are_made_again_the_same_and_share_no_caption(name):
    make_prompts = pytest.importorskip("reference.avatars.make_prompts", reason="the source tree is not beside the tests")
    lists = make_prompts.make_lists(name)
    for use, captions in lists.items():
        assert (DIRECTORY / f"{name}-{use}.txt").read_text() == "\n".join(captions) + "\n"
    listed = [caption for captions in lists.values() for caption in captions]
    assert len(set(listed)) == len(listed) == 128 + 128 + 64 + 128


def test_a_users_prompts_are_divided_two_to_one_to_one_by_their_text():
    prompts = [f"prompt {i}" for i in range(1000)]
    split = split_prompts(prompts)
    assert sorted((*split.fit, *split.stop, *split.measure)) == sorted(prompts)
    shares = [len(part) / 1000 for part in (split.fit, split.stop, split.measure)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.05)
    assert split_prompts(prompts[::-1]).fit == split.fit[::-1]
    assert split_prompts(prompts[:10]).measure == tuple(p for p in prompts[:10] if p in split.measure)
