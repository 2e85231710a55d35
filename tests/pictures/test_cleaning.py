import pytest

from cachec.pictures.cleaning import clean


@pytest.mark.parametrize(
    ("steps", "prompt", "cleaned"),
    [
        ((), " a  b ", " a  b "),
        (("lower", "strip"), " A b ", "a b"),
        (("unescape", "strip", "single spaces"), " a &amp;amp;\n b ", "a & b"),
        (("space if empty",), "", " "),
        (("texts in quotes",), 'a sign "stop", “go” and "stop"', 'Text "stop". Text "go". '),
        (("texts in quotes",), "no sign", ""),
    ],
)
def test_steps_are_taken_in_their_order(steps, prompt, cleaned):
    assert clean(prompt, steps) == cleaned
