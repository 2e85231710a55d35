"""The page, in a browser: a prompt is typed, both pictures are drawn, and what goes wrong is told."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from browser import browsing, find_browser
from numpy_engines import compute
from PIL import Image
from toy_server import POISON, ToyEncoder, ToyPictures, running, toy_served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed here: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Waves(ToyPictures):
    """Pictures that a browser can show."""

    def decode(self, latents, *, size=None):
        y, x = np.mgrid[0:160, 0:240] / 160
        waves = [np.sin(5 * (x * latents[0, 0, i] + y * latents[0, 1, i]) + latents[0, 2, i]) for i in range(3)]
        return ((np.stack(waves, -1) * 0.5 + 0.5) * 255).astype(np.uint8)[None]

    def to_png(self, picture):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return file.getvalue()


def slow(**inputs):
    time.sleep(0.02)
    return compute(**inputs)


def test_the_page_draws_exact_beside_fast(tmp_path):
    with running(toy_served(pictures=Waves, engines={"compute": slow})) as server, browsing(tmp_path / "profile") as page:
        page.open(server.url)
        page.until("document.querySelectorAll('#level option').length == 1")
        page.value("document.getElementById('prompt').focus()")
        page.type("a yellow ring left of a purple cross")
        page.value("document.getElementById('go').click()")
        page.until("document.getElementById('verdict').innerText.includes('as fast')")
        shown = "[...document.querySelectorAll('figure img')].map((one) => [one.naturalWidth, one.alt, one.src.slice(0, 22)])"
        assert page.value(shown) == [[240, "a yellow ring left of a purple cross", "data:image/png;base64,"]] * 2
        said = page.value("document.body.innerText")
        assert "uncached: 8 of 8 steps" in said
        assert "default: 4 of 8 steps, 31.5 dB" in said
        picture = page.screenshot()
        assert np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).std() > 5
        if place := os.environ.get("CACHEC_PAGE"):
            Path(place).write_bytes(picture)


class Echo(ToyEncoder):
    """Shows the first colour of what was begun with, whatever became of it."""

    def encode_pictures(self, pictures, *, size=None):
        self.seen = pictures
        return super().encode_pictures(pictures, size=size)

    def to_png(self, picture):
        return Waves.to_png(self, picture)


CHOOSE = """
const canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [96, 32];
canvas.getContext("2d").fillStyle = "rgb(10 200 60)";
canvas.getContext("2d").fillRect(0, 0, 96, 32);
const blob = await new Promise((done) => canvas.toBlob(done));
const given = new DataTransfer();
given.items.add(new File([blob], "green.png"));
document.getElementById("picture").files = given.files;
document.getElementById("picture").dispatchEvent(new Event("change"));
"""


def test_the_page_begins_with_a_picture_that_is_cut_to_the_size(tmp_path):
    served = toy_served(pictures=Echo, strengths=(0.5,))
    with running(served) as server, browsing(tmp_path / "profile") as page:
        page.open(f"{server.url}/#prompt=a+ring&seed=3")
        page.until("!document.getElementById('begins').hidden")
        assert page.value("document.getElementById('strengths').hidden") is True
        page.value(f"(async () => {{{CHOOSE}}})()")
        page.until("!document.getElementById('strengths').hidden")
        assert page.value("document.getElementById('strength').innerText.split('\\n')") == [
            "50 % of the steps",
            "100 % of the steps",
        ]
        page.value("document.getElementById('go').click()")
        page.until("document.getElementById('verdict').innerText.includes('as fast')")
    assert served.pictures.seen.shape == (1, 16, 24, 3)
    assert (served.pictures.seen == [10, 200, 60]).all()


def test_the_page_tells_what_goes_wrong_and_asks_for_the_key(tmp_path):
    with running(toy_served(), key="secret") as server, browsing(tmp_path / "profile") as page:
        page.open(f"{server.url}/#prompt={POISON}")
        page.until("!document.getElementById('keys').hidden")
        page.value("document.getElementById('key').focus()")
        page.type("secret")
        page.value("document.getElementById('key').onchange()")
        page.until("document.querySelectorAll('#level option').length == 1")
        page.value("document.getElementById('go').click()")
        page.until("document.getElementById('verdict').innerText.includes('NaN or infinity')")
        assert page.value("document.getElementById('go').disabled") is False
