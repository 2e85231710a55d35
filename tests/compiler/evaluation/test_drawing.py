import xml.etree.ElementTree as ElementTree

import matplotlib as mpl

from cachec.compiler.evaluation.drawing import Caption, add_axes, draw, text_width

CAPTION = Caption("one", "<a> & b", "it's $5")


def paint(figure):
    axes = add_axes(figure, left=40, top=10, right=10, bottom=40)
    axes.plot([0, 1], [0, 1], gid="the line")
    axes.text(0, 0, "costs $5 or $6, <b>")
    return {"the line": "a < b"}


def test_an_element_says_what_it_shows_and_scales():
    root = ElementTree.fromstring(draw(CAPTION, 200, 100, paint))
    assert (root.tag, root.get("viewBox"), root.get("width")) == ("svg", "0 0 200 100", None)
    names = root.get("aria-labelledby").split()
    assert [node.text for node in root if node.get("id") in names] == [CAPTION.title, CAPTION.description]
    assert "costs $5 or $6, <b>" in [node.text for node in root.iter("text")]
    assert [node.find("title").text for node in root.iter("g") if node.find("title") is not None] == ["a < b"]


def test_nothing_reaches_beyond_the_element():
    """Style sheets are the page's, namespaces are not needed, ids are the plot's own, and references find theirs."""
    text = draw(CAPTION, 200, 100, paint)
    assert "<style" not in text
    assert "http" not in text
    root = ElementTree.fromstring(text)
    ids = {node.get("id") for node in root.iter()} - {None}
    assert all(name.startswith("one-") and " " not in name for name in ids)
    used = [node.get("href") for node in root.iter("use")] + [node.get("clip-path", "") for node in root.iter()]
    assert len(found := {name.removeprefix("url(").strip("#)") for name in used} - {""}) > 2
    assert found <= ids


def test_equal_plots_have_equal_bytes_whatever_the_users_settings_are(monkeypatch):
    first = draw(CAPTION, 200, 100, paint)
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "black")
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 9)
    assert draw(CAPTION, 200, 100, paint) == first


def test_the_width_of_a_text_grows_with_it():
    assert 0 < text_width("i") < text_width("w") < text_width("www") < 60
    assert text_width("a", "normal") < text_width("a")
