"""Videos over HTTP: jobs, and one that is waited for."""

import time

import openai
import pytest
from mp4_files import check_mp4
from numpy_engines import compute
from toy_server import POISON, running, toy_served

import cachec
from cachec.serving.limits import Limits
from cachec.serving.server import open_all


@pytest.fixture(scope="module")
def server():
    with running(toy_served(frames=5), limits=Limits(kept=2)) as one:
        yield one


def wait(server, number):
    while (found := server.ask("GET", f"/v1/videos/{number}")[2])["status"] not in ("completed", "failed"):
        time.sleep(0.005)
    return found


def test_a_job_is_asked_for_looked_at_fetched_and_let_go(server):
    status, _, job = server.ask("POST", "/v1/videos", {"prompt": "a", "size": "24x16", "seed": 1, "fps": 10})
    assert (status, job["object"], job["model"], job["size"], job["seconds"]) == (200, "video", "toy", "24x16x5", "0.5")
    done = wait(server, job["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    status, headers, file = server.ask("GET", f"/v1/videos/{job['id']}/content")
    assert (status, headers["content-type"]) == (200, "video/mp4")
    assert file == b"mp4 of ((5, 16, 24, 3), 10.0)"
    assert job["id"] in [one["id"] for one in server.ask("GET", "/v1/videos")[2]["data"]]
    assert server.ask("DELETE", f"/v1/videos/{job['id']}")[2]["deleted"] is True
    assert server.ask("GET", f"/v1/videos/{job['id']}")[0] == 404


def test_one_is_waited_for(server):
    status, headers, file = server.ask("POST", "/v1/videos/sync", {"prompt": "a", "num_frames": 5, "seconds": 1})
    assert (status, headers["content-type"], file) == (200, "video/mp4", b"mp4 of ((5, 16, 24, 3), 5.0)")


def test_one_that_fails_says_why(server):
    job = server.ask("POST", "/v1/videos", {"prompt": POISON})[2]
    done = wait(server, job["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "engine_failed")
    status, _, data = server.ask("GET", f"/v1/videos/{job['id']}/content")
    assert (status, data["error"]["code"]) == (409, "not_ready")


def test_the_oldest_make_room(server):
    numbers = [server.ask("POST", "/v1/videos", {"prompt": "a"})[2]["id"] for _ in range(4)]
    for number in numbers[2:]:
        wait(server, number)
    assert [one["id"] for one in server.ask("GET", "/v1/videos")[2]["data"]][-2:] == numbers[2:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 9}, "size is 24x16x9, but the bundle was compiled for 24x16x5"),
        ({"fps": 0}, "fps is 0: should be greater than or equal to 0.01"),
        ({"fps": 1e-9}, "fps is 1e-09: should be greater than or equal to 0.01"),
        ({"seconds": 3600}, "seconds is 3600, in which 5 frames would play at 0.00138889 a second; it may be 0.01 to 240"),
        ({"seconds": 1e-320}, "in which 5 frames would play at inf a second; it may be 0.01 to 240"),
        ({"input_reference": "x"}, "input_reference: no bundle makes videos of a picture"),
        ({"n": 2}, "there is no field 'n'"),
    ],
)
def test_what_does_not_fit_is_told_in_words(server, fields, message):
    status, _, data = server.ask("POST", "/v1/videos", {"prompt": "a", **fields})
    assert status == 400
    assert message in data["error"]["message"]


def test_a_job_is_cancelled_when_it_is_deleted():
    def slow(**inputs):
        time.sleep(0.01)
        return compute(**inputs)

    with running(toy_served(frames=5, engines={"compute": slow})) as one:
        job = one.ask("POST", "/v1/videos", {"prompt": "a"})[2]
        assert job["status"] == "queued"
        one.ask("DELETE", f"/v1/videos/{job['id']}")
        while one.desk.num_present:
            time.sleep(0.002)
        assert one.ask("GET", "/v1/videos")[2]["data"] == []


def test_the_openai_client_makes_a_video(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    made = client.videos.create_and_poll(prompt="a ring", model="toy", seconds="4", poll_interval_ms=5)
    assert made.status == "completed"
    assert client.videos.download_content(made.id).read() == b"mp4 of ((5, 16, 24, 3), 1.25)"
    client.close()


@pytest.mark.slow
def test_a_real_bundle_answers_with_a_file_of_the_frames_that_generate_makes(three_steps):
    bundle, prompt = three_steps("tiny-hunyuan"), "a laughing face with short blue hair , moves left"
    (served,) = open_all([bundle], lanes=2)
    try:
        with running(served) as one:
            status, headers, file = one.ask("POST", "/v1/videos/sync", {"prompt": prompt, "seed": 7, "fps": 12})
    finally:
        served.close()
    assert (status, headers["content-type"]) == (200, "video/mp4")
    with cachec.load(bundle) as loaded:
        check_mp4(file, loaded.generate([prompt], seeds=[7])[0], fps=12)
