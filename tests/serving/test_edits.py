"""``/v1/images/edits``: requests that begin with a picture, as clients send them."""

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image
from toy_server import ToyEncoder, form, running, toy_loaded, toy_served

from cachec.pictures.beginning import Beginning, start_of
from cachec.runtime.noise import make_noise
from cachec.serving.limits import Limits

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def png(picture=PICTURE):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server():
    with running(toy_served(pictures=ToyEncoder, strengths=(0.3, 0.5, 0.6)), limits=Limits(picture=50_000)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(seed, strength, level=None, steps=None):
    """The file that a session which begins there gives."""
    at = toy_loaded().at(steps=steps)
    pictures = ToyEncoder(at)
    begin = Beginning(start_of(strength, steps or 8), pictures.encode_pictures(PICTURE[None]))
    session = at.session(level=level, start=begin.start)
    noise = make_noise(seed, session.latent_shape[1:])[None]
    latents = session.run(pictures.encode(["a ring"]), begin.mixed(noise, session.program.sigmas))
    return pictures.to_png(pictures.decode(latents)[0])


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, {"strength": None}),
        ({"quality": "exact", "strength": 0.3, "size": "24x16"}, {"strength": 0.3, "level": "uncached"}),
        ({"num_inference_steps": 4, "strength": 0.5}, {"strength": 0.5, "steps": 4}),
        ({"strength": 1}, {"strength": 1.0}),
    ],
    ids=str,
)
def test_the_openai_client_gets_what_sessions_give_that_begin_there(client, fields, where):
    known = {name: fields[name] for name in ("quality", "size") if name in fields}
    more = {"seed": 5, **{name: value for name, value in fields.items() if name not in known}}
    made = client.images.edit(image=("in.png", png()), prompt="a ring", n=2, **known, extra_body=more)
    files = [base64.b64decode(one.b64_json) for one in made.data]
    assert files == [expected(seed, **where) for seed in (5, 6)]


def test_a_list_of_one_is_taken_and_progress_is_streamed(client):
    stream = client.images.edit(image=[png()], prompt="a ring", quality="exact", stream=True, extra_body={"seed": 5})
    kinds, last = [], None
    for last in stream:
        kinds.append(last.type)
    assert kinds == ["image_edit.progress"] * 5 + ["image_edit.completed"]
    assert base64.b64decode(last.b64_json) == expected(5, None, level="uncached")


def post(server, parts, kind=None):
    body, form_kind = form(parts)
    return server.ask("POST", "/v1/images/edits", body, **{"Content-Type": kind or form_kind})


@pytest.mark.parametrize(
    ("parts", "status", "message"),
    [
        ({"image": None}, 400, "image is missing"),
        ({"image": b"GIF89a"}, 400, "the picture is no PNG, JPEG, WEBP that can be read"),
        ({"image": png(PICTURE[:8])}, 400, "the picture is 24x8, and wanted is 24x16"),
        ({"size": "48x32"}, 400, "size is 48x32, but the bundle was compiled for 24x16"),
        ({"strength": "0"}, 400, "strength is '0': should be greater than 0"),
        ({"strength": "0.7"}, 400, "strength would begin at step 2 of 8, and ready are those of 0.3, 0.5, 0.6, 1"),
        ({"mask": b"x"}, 400, "mask: the whole picture is changed"),
        ({"prompt": None}, 400, "prompt is missing"),
        ({"prompts": "x"}, 400, "there is no field 'prompts'. Known: background, deadline, "),
        ({"image": b"a" * 60_000}, 413, "the body is larger than the 50000 bytes"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_does_not_fit_is_told_in_words(server, parts, status, message):
    given = {"image": png(), "prompt": "a", **parts}
    found, _, data = post(server, [(name, value) for name, value in given.items() if value is not None])
    assert (found, message in data["error"]["message"]) == (status, True), data


def test_what_is_no_form_or_has_two_pictures_is_refused(server):
    assert post(server, [], kind="application/json")[0] == 415
    assert post(server, [("image", png()), ("image", png()), ("prompt", "a")])[2]["error"]["message"].endswith("field twice")


def test_a_bundle_without_an_encoder_says_so(toy):
    status, _, data = post(toy, [("image", png()), ("prompt", "a")])
    assert (status, data["error"]["message"]) == (400, "toy takes no pictures, as it has no encoder of them")
    assert toy.ask("GET", "/v1/models/toy")[2]["takes_pictures"] is False
