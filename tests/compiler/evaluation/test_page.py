import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from toy_evaluation import PROMPT, made_up_report

from cachec.compiler.evaluation.page import encode_png, render_page
from cachec.compiler.evaluation.words import HEADER


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def page():
    return render_page(made_up_report())


def test_the_page_is_one_file_without_scripts(page):
    tags = Tags(page)
    assert not {"script", "link", "iframe", "object"} & set(tags.found)
    assert not re.search(r"https?://|url\([^#]|@import", page)
    sources = [value for name, value in tags.attributes if name in ("src", "href") and not value.startswith("#")]
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(name.startswith("on") for name, _ in tags.attributes)


def test_no_two_parts_have_one_id(page):
    ids = [value for name, value in Tags(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_prompts_are_escaped(page):
    assert PROMPT not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page


def test_the_page_has_every_part(page):
    for part in ("Pictures", "Table", "PSNR against seconds", "Error by step", "Schedule", "Coefficients", "Settings"):
        assert f"<h2>{part}" in page
    assert all(name in page.replace("\u00a0", " ") for name in HEADER)
    assert page.count("<svg") == 4
    assert "<dt>worst prompt</dt><dd>45.0 dB</dd>" in page


def test_a_page_without_pictures_leaves_these_parts_out():
    page = render_page(made_up_report(kept=False))
    assert "<h2>Pictures" not in page
    assert "<h2>Error by step" not in page
    assert "<img" not in page


def test_large_pictures_are_reduced():
    content = base64.b64decode(encode_png(np.zeros((40, 20, 3)), side=10))
    assert Image.open(io.BytesIO(content)).size == (5, 10)


def test_videos_move():
    video = np.random.default_rng(0).random((25, 16, 12, 3))
    shown = Image.open(io.BytesIO(base64.b64decode(encode_png(video))))
    assert (shown.size, shown.n_frames) == ((12, 16), 9)
