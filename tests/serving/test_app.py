"""The server as its clients see it: over HTTP, with real lanes on engines of numpy."""

import base64
import json

import openai
import pytest
from toy_server import PNG, POISON, ToyPictures, running, toy_loaded, toy_served

from cachec.runtime.device import Host
from cachec.runtime.host_memory import peak_memory
from cachec.runtime.noise import make_noise
from cachec.serving.limits import Limits


def expected(prompt, seed, level=None, steps=None):
    """The file that a session of its own gives."""
    at = toy_loaded().at(steps=steps)
    pictures, session = ToyPictures(at), at.session(level=level)
    latents = session.run(pictures.encode([prompt]), make_noise(seed, session.latent_shape[1:])[None])
    return pictures.to_png(pictures.decode(latents)[0])


@pytest.mark.parametrize(
    ("fields", "where", "told"),
    [
        ({}, {}, ("default", 8)),
        ({"quality": "auto", "size": "auto"}, {}, ("default", 8)),
        ({"quality": "exact"}, {"level": "uncached"}, ("uncached", 8)),
        ({"quality": "lossless", "size": "24x16", "num_inference_steps": 4}, {"steps": 4}, ("uncached", 4)),
        ({"width": 24, "height": 16, "style": "vivid", "user": "me"}, {}, ("default", 8)),
    ],
    ids=str,
)
def test_pictures_are_what_sessions_give(toy, fields, where, told):
    status, data = toy.generate("a ring", seed=5, n=2, **fields)
    assert status == 200, data
    assert (data["quality"], data["num_inference_steps"]) == told
    for place, one in enumerate(data["data"]):
        assert base64.b64decode(one["b64_json"]) == expected("a ring", 5 + place, **where)
    assert 0 < data["denoise_time_s"] < data["inference_time_s"]
    if (peak := peak_memory()) is not None:  # Linux counts pages by the batch
        assert data["peak_memory_mb"] * 2**20 == pytest.approx(peak, rel=0.05)


def test_a_peak_of_memory_is_not_told_of_a_device_beside_the_host():
    class Beside(Host):
        beside_host = True

    with running(toy_served(engines={"device": Beside()})) as server:
        status, data = server.generate()
    assert (status, "inference_time_s" in data, "peak_memory_mb" in data) == (200, True, False)


def test_a_list_of_seeds_and_none(toy):
    _, data = toy.generate("a ring", seed=[7, 3], n=2)
    files = [base64.b64decode(one["b64_json"]) for one in data["data"]]
    assert files == [expected("a ring", seed) for seed in (7, 3)]
    drawn = {toy.generate()[1]["data"][0]["seed"] for _ in range(3)}
    assert len(drawn) == 3


def test_urls_are_fetched_without_a_key_and_the_oldest_make_room():
    with running(toy_served(), limits=Limits(kept=2), key="secret") as server:
        status, _, data = server.ask(
            "POST", "/v1/images/generations", {"prompt": "a", "n": 3, "response_format": "url"}, Authorization="Bearer secret"
        )
        paths = [one["url"].removeprefix(server.url) for one in data["data"]]
        answers = [server.ask("GET", path) for path in paths]
    assert status == 200
    assert [one[0] for one in answers] == [404, 200, 200]
    assert answers[2][2].startswith(PNG)


REFUSED = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "a \ud83d"}, "prompt: the text has '\\ud83d' at place 2, which is no character"),
    ({"prompt": 3}, "prompt is 3: should be a valid string"),
    ({"n": "2"}, "n is '2': should be a valid integer"),
    ({"n": 0}, "n is 0: should be greater than or equal to 1"),
    ({"n": 9}, "n is 9; this server makes up to 8 a request"),
    ({"seed": -1}, "seed is -1: should be greater than or equal to 0"),
    ({"seed": 2**40}, "seed is 1099511627776: should be less than 4294967296"),
    ({"seed": [1, 2]}, "seed has 2 numbers, and n is 1"),
    ({"prompt": "a" * 5000}, "prompt has 5000 characters; this server takes up to 4000"),
    ({"quality": "high"}, "there is no quality 'high' here. Known: uncached, default; auto is default, exact and lossless are"),
    ({"num_inference_steps": 4, "quality": "default"}, "there is no quality 'default' here. Known: uncached"),
    ({"num_inference_steps": 5}, "steps is 5, but the bundle was compiled for 8, 4"),
    ({"size": "1024x1024"}, "size is 1024x1024, but the bundle was compiled for 24x16"),
    ({"size": "large"}, "size 'large' is not of the form WIDTHxHEIGHT"),
    ({"width": 25}, "size is 25x16, but"),
    ({"guidance_scale": 3.5}, "requests of this bundle have no guidance scale"),
    ({"true_cfg_scale": 3.5}, "requests of this bundle have no negative branch"),
    ({"negative_prompt": "blur"}, "requests of this bundle have no negative branch"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf: should be a finite number"),
    ({"lora": {"name": "x"}}, "lora: weights are fused ahead"),
    ({"strength": 0.5}, "strength: it says how far a picture is changed: post one to /v1/images/edits"),
    ({"output_format": "webp"}, "output_format is 'webp': should be 'png'"),
    ({"background": "transparent"}, "background is 'transparent': should be 'auto' or 'opaque'"),
    ({"enable_teacache": True}, "there is no field 'enable_teacache'. Known: background, deadline, "),
    ({"deadline": 1e-9}, "deadline is 1e-09 s, but level default takes"),
    ({"partial_images": 9}, "partial_images is 9: should be less than or equal to 3"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_does_not_fit_is_told_in_words(toy, fields, message):
    status, data = toy.generate(**fields)
    assert status == 400
    assert message in data["error"]["message"]
    assert data["error"]["param"] in {*fields, "size", "quality", "num_inference_steps"}
    assert data["error"]["type"] == "invalid_request_error"


def test_what_no_bundle_has_is_told_in_words(toy):
    status, data = toy.generate(model="flux-2")
    assert (status, data["error"]["code"]) == (404, "model_not_found")
    assert "unknown model 'flux-2'" in data["error"]["message"]
    status, _, data = toy.ask("POST", "/v1/images/variations", {})
    assert (status, data["error"]["message"][-28:]) == (400, "a prompt to /v1/images/edits")
    status, _, data = toy.ask("POST", "/v1/videos", {"prompt": "a"})
    assert (status, data["error"]["message"]) == (400, "toy makes pictures: post to /v1/images/generations")
    assert toy.ask("GET", "/v2")[0] == 404
    assert toy.ask("GET", "/v1/images/generations")[0] == 405


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 5000, b'{"prompt": "a", "n": 1e999}', b"\xff\xfe", b"3", b'{"prompt": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_request_is_refused(toy, body):
    status, _, data = toy.ask("POST", "/v1/images/generations", body, **{"Content-Type": "application/json"})
    assert status == 400
    assert data["error"]["code"] in ("invalid_body", "invalid_value")


def test_a_body_of_another_type_is_refused(toy):
    status, _, data = toy.ask("POST", "/v1/images/generations", b'{"prompt": "a"}', **{"Content-Type": "text/plain"})
    assert (status, data["error"]["message"][:22]) == (415, "the body is text/plain")


def test_one_that_fails_fails_alone(toy):
    status, data = toy.generate(POISON)
    assert (status, data["error"]["code"]) == (500, "engine_failed")
    assert "hold NaN or infinity" in data["error"]["message"]
    assert toy.generate()[0] == 200


def test_models_say_what_was_measured(toy):
    status, _, data = toy.ask("GET", "/v1/models")
    (one,) = data["data"]
    assert (status, one["id"], one["kind"], one["default_level"]) == (200, "toy", "image", "default")
    level = one["levels"]["default"]
    assert (level["psnr_db"], level["speedup"], level["computed_steps"], level["exact"]) == (31.5, 1.9, 4, False)
    assert 0 < level["seconds"] < one["levels"]["uncached"]["seconds"]
    assert [choice["num_inference_steps"] for choice in one["choices"]] == [8, 4]
    assert toy.ask("GET", "/v1/models/toy")[2] == one
    assert toy.ask("GET", "/v1/models/other")[0] == 404


def test_metrics_count_by_level(toy):
    def value(name):
        lines = toy.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    made = 'cachec_requests_total{level="uncached",model="toy",outcome="made"}'
    steps = 'cachec_step_seconds_count{level="uncached",model="toy"}'
    names = (made, steps, "cachec_refused_total", "cachec_batch_rows_sum")
    before = [value(name) for name in names]
    assert toy.generate(quality="exact", n=2)[0] == 200
    toy.generate(n=99)
    after = [value(name) for name in names]
    gained = [new - old for new, old in zip(after, before, strict=True)]
    assert gained[0] == 1
    assert 8 <= gained[1] <= 16
    assert gained[2:] == [1, 16]
    assert value("cachec_queued_requests") == value("cachec_running_requests") == 0


def test_progress_and_previews_are_streamed(toy):
    status, headers, data = toy.ask(
        "POST", "/v1/images/generations", {"prompt": "a", "seed": 3, "quality": "exact", "stream": True, "partial_images": 2}
    )
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = [json.loads(line.removeprefix("data: ")) for line in data.decode().splitlines() if line.startswith("data: ")]
    kinds = [one["type"].removeprefix("image_generation.") for one in events]
    assert [one["step"] for one in events if one["type"].endswith("progress")] == list(range(1, 9))
    assert [kinds.count(kind) for kind in ("progress", "partial_image", "completed")] == [8, 2, 1]
    assert [one["partial_image_index"] for one in events if one["type"].endswith("partial_image")] == [0, 1]
    assert base64.b64decode(events[-1]["b64_json"]) == expected("a", 3, level="uncached")


def test_an_error_in_a_stream_is_an_event(toy):
    data = toy.ask("POST", "/v1/images/generations", {"prompt": POISON, "stream": True})[2].decode()
    assert "event: error\n" in data
    assert "hold NaN or infinity" in data


def test_the_openai_client_makes_pictures(toy):
    client = openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none")
    made = client.images.generate(prompt="a ring", model="toy", n=1, quality="auto", extra_body={"seed": 5})
    assert base64.b64decode(made.data[0].b64_json) == expected("a ring", 5)
    stream = client.images.generate(prompt="a ring", model="toy", stream=True, partial_images=1, extra_body={"seed": 5})
    *_, last = (event for event in stream)
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == expected("a ring", 5)
    with pytest.raises(openai.BadRequestError, match="there is no quality 'high' here"):
        client.images.generate(prompt="a ring", quality="high")
    assert [one.id for one in client.models.list()] == ["toy"]
    client.close()


def test_health_and_the_page(toy):
    assert toy.ask("GET", "/health")[2] == {"status": "ok"}
    status, headers, page = toy.ask("GET", "/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert b"<title>cachec" in page


def test_several_bundles_are_told_apart():
    with running(toy_served("one"), toy_served("org/two", engines={})) as server:
        answers = [server.generate("a", seed=1, **({"model": name} if name else {}))[1] for name in ("one", "org/two", None)]
        names = [one["id"] for one in server.ask("GET", "/v1/models")[2]["data"]]
        again = [server.ask("GET", f"/v1/models/{name}")[2]["id"] for name in ("one", "org/two", "org%2Ftwo")]
    assert (names, again) == (["one", "org/two"], ["one", "org/two", "org/two"])
    assert [one["model"] for one in answers] == ["one", "org/two", "one"]
    assert len({one["data"][0]["b64_json"] for one in answers}) == 1


def test_nothing_of_a_request_is_logged(toy, caplog):
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", logger="cachec.serving")
    toy.generate("a very private thing")
    toy.generate("a very private thing", n=99)
    assert "a very private thing" not in caplog.text
    assert "request " in caplog.text
