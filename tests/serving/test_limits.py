"""What a server does at its limits: too much, too slow, too late, gone, and told to stop."""

import json
import socket
import threading
import time
from dataclasses import fields

import pytest
from numpy_engines import compute
from toy_server import ToyPictures, running, toy_served

from cachec.runtime.errors import InputError
from cachec.serving.limits import Limits


def slow(**inputs):
    time.sleep(0.01)
    return compute(**inputs)


def slow_served(**options):
    return toy_served(engines={"compute": slow}, in_turns=True, **options)


def in_threads(count, ask):
    """What ``ask`` gives, asked so often at once."""
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def raw(server, data):
    """A connection on which so much was sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


def request(body, length=None, path="/v1/images/generations"):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("name", [one.name for one in fields(Limits)])
def test_limits_that_allow_nothing_are_refused(name):
    with pytest.raises(InputError, match=f"the limit {name} is -1; it must be"):
        Limits(**{name: -1})


def test_a_full_queue_says_when_to_come_again():
    with running(slow_served(lanes=2), limits=Limits(queue=2)) as server:
        threads, answers = in_threads(4, lambda: server.generate(quality="exact"))
        until(lambda: server.desk.num_present == 4)
        status, headers, data = server.ask("POST", "/v1/images/generations", {"prompt": "a"})
        for thread in threads:
            thread.join()
        assert (status, data["error"]["code"], data["error"]["type"]) == (429, "queue_full", "rate_limit_error")
        assert 1 <= int(headers["Retry-After"]) <= 10
        assert [one[0] for one in answers] == [200] * 4
        assert server.generate()[0] == 200


def test_a_body_that_is_too_large_or_too_slow_is_refused():
    with running(toy_served(), limits=Limits(body=200, body_seconds=0.2)) as server:
        assert server.generate("a" * 300)[0] == 413
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + b"a" * 255 + b"\r\n"
        with raw(server, chunked) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        with raw(server, request(b'{"pro', length=100)) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_key_is_wanted_for_all_but_the_page_and_health():
    with running(toy_served(), key="schlüssel") as server:
        ask = {path: server.ask("GET", path)[0] for path in ("/", "/health", "/v1/models", "/metrics", "/v1/videos")}
        wrong = server.ask("GET", "/v1/models", Authorization="Bearer schl")[0]
        right = server.ask("GET", "/v1/models", Authorization="Bearer schlüssel".encode())[0]
    assert ask == {"/": 200, "/health": 200, "/v1/models": 401, "/metrics": 401, "/v1/videos": 401}
    assert (wrong, right) == (401, 200)


def test_pages_of_other_sites_may_not_ask(toy):
    for origin in ("http://evil.example", "http://["):
        assert toy.ask("GET", "/v1/models", Origin=origin)[0] == 403
    assert toy.ask("GET", "/v1/models", Origin=toy.url)[0] == 200


def test_a_name_that_leads_to_loopback_is_refused_without_a_key():
    """Else a page of any site could rebind its name to 127.0.0.1 and read what is made here."""
    names = {"evil.example:80": 403, "localhost": 200, "[::1]:8000": 200}
    with running(toy_served(), only_here=True) as server:
        assert {name: server.ask("GET", "/v1/models", Host=name)[0] for name in names} == names
    with running(toy_served(), only_here=True, key="secret") as server:
        given = {"Host": "evil.example", "Authorization": "Bearer secret"}
        assert server.ask("GET", "/v1/models", **given)[0] == 200


def test_a_client_that_goes_away_lets_go_of_its_lane():
    with running(slow_served()) as server:
        body = json.dumps({"prompt": "a", "quality": "exact"}).encode()
        stream = json.dumps({"prompt": "a", "quality": "exact", "stream": True}).encode()
        for one in (body, stream):
            with raw(server, request(one)):
                until(lambda: server.desk.served["toy"].lanes.num_running)
            until(lambda: not server.desk.num_present)
            until(lambda: not server.desk.served["toy"].lanes.num_running, 0.5)
        text = server.ask("GET", "/metrics")[2].decode()
    assert 'cachec_requests_total{level="uncached",model="toy",outcome="cancelled"} 2.0' in text


def test_a_request_that_takes_too_long_is_given_up():
    with running(slow_served(), limits=Limits(seconds=0.03)) as server:
        status, data = server.generate(quality="exact")
        until(lambda: not server.desk.served["toy"].lanes.num_running, 0.5)
    assert (status, data["error"]["code"]) == (504, "timeout")


def test_a_deadline_that_cannot_be_kept_is_refused_at_once():
    with running(slow_served(lanes=1, policy="fifo")) as server:
        threads, answers = in_threads(6, lambda: server.generate(quality="exact"))
        until(lambda: server.desk.served["toy"].lanes.num_queued > 3)
        status, headers, data = server.ask("POST", "/v1/images/generations", {"prompt": "a", "deadline": 0.15})
        for thread in threads:
            thread.join()
        text = server.ask("GET", "/metrics")[2].decode()
    assert (status, data["error"]["code"]) == (429, "deadline")
    assert "but the request would take" in data["error"]["message"]
    assert int(headers["Retry-After"]) >= 1
    assert 'cachec_deadline_misses_total{level="default",model="toy"} 1.0' in text
    assert {one[0] for one in answers} == {200}


class SlowPictures(ToyPictures):
    """Whose decoder takes a tenth of a second."""

    def decode(self, latents, *, size=None):
        time.sleep(0.1)
        return super().decode(latents, size=size)


def test_a_deadline_has_room_for_what_decoding_takes():
    with running(toy_served(pictures=SlowPictures)) as server:
        status, data = server.generate(n=2, deadline=0.15)
        assert (status, data["error"]["message"][:27]) == (400, "deadline is 0.15 s, but lev")
        assert server.generate(n=2, deadline=10)[0] == 200


def test_who_is_decoded_holds_up_who_has_a_deadline_where_they_take_turns():
    with running(toy_served(pictures=SlowPictures, in_turns=True, lanes=1, policy="fifo")) as server:
        threads, answers = in_threads(6, server.generate)
        until(lambda: server.desk.num_present == 6)
        status, data = server.generate(deadline=0.35)  # one would have enough: six are decoded for 0.1 s each
        for thread in threads:
            thread.join()
        between = server.desk.ticker.seconds_between
    assert (status, data["error"]["code"]) == (429, "deadline"), data
    assert {one[0] for one in answers} == {200}
    assert between >= 0.1


@pytest.mark.parametrize(("grace", "status"), [(10.0, 200), (0.0, 503)])
def test_what_runs_when_it_stops_is_finished_or_handed_back(grace, status):
    with running(slow_served(), limits=Limits(grace=grace)) as server:
        threads, answers = in_threads(3, lambda: server.generate(quality="exact"))
        until(lambda: server.desk.num_present == 3)
        drained = server.drain()
        until(lambda: server.desk.draining)
        assert server.generate()[0] == 503
        assert server.ask("GET", "/health")[::2] == (503, {"status": "stopping"})
        drained.result(10)
        for thread in threads:
            thread.join()
    assert [one[0] for one in answers] == [status] * 3
    if status == 503:
        assert answers[0][1]["error"]["message"] == "the server stops, and this was not done: send it again"


def test_a_tick_that_fails_stops_the_server_in_words():
    def breaks(**inputs):
        if (inputs["prompt"] > 3).any():
            raise MemoryError("no room")
        return compute(**inputs)

    with running(toy_served(engines={"compute": breaks})) as server:
        assert server.generate()[0] == 200
        status, data = server.generate("poison")
        assert (status, data["error"]["message"]) == (500, "the lanes stand still: no room")
        assert server.generate()[1]["error"]["code"] == "broken"
        assert server.ask("GET", "/health")[::2] == (503, {"status": "broken"})
