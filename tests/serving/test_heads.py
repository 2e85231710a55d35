"""Heads that do not end, with both of uvicorn's readers of HTTP, and what comes while an answer is on its way or made."""

import importlib
import json
import socket
import time

import pytest
from numpy_engines import compute
from toy_server import running, toy_served

from cachec.serving.heads import LARGEST
from cachec.serving.limits import Limits

GENERATIONS = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LONG = json.dumps({"prompt": "a", "quality": "exact", "n": 8}).encode()  # in one lane, 64 steps
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(params=["h11", "httptools"])
def how(request):
    pytest.importorskip(request.param)
    name = {"h11": "H11Protocol", "httptools": "HttpToolsProtocol"}[request.param]
    return {"protocol": getattr(importlib.import_module(f"uvicorn.protocols.http.{request.param}_impl"), name)}


def slow(**inputs):
    time.sleep(0.01)
    return compute(**inputs)


def slow_served():
    return toy_served(engines={"compute": slow}, lanes=1)


def raw(server, data):
    """A connection on which so much was sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


def post(body, length=None):
    return GENERATIONS + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body


def begun(server):
    """A connection whose long request is taken."""
    connection = raw(server, post(LONG))
    while server.desk.num_present < 8:
        time.sleep(0.002)
    return connection


def read_answer(answers):
    """The status and the body of an answer that has its length."""
    status, length = int(answers.readline().split()[1]), 0
    while (line := answers.readline()) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, json.loads(answers.read(length))


def test_a_head_that_does_not_end_is_refused_and_its_connection_closed(how):
    with running(toy_served(), how=how, limits=Limits(body_seconds=0.2)) as server:
        with raw(server, b"GET /health HTTP/1.1\r\nHost: 12") as connection:
            answers = connection.makefile("rb")
            status, data = read_answer(answers)
            assert (status, data["error"]["code"], answers.read()) == (408, "slow_head", b"")
        with raw(server, b"") as connection:
            assert connection.recv(100) == b""


def test_a_head_that_is_too_large_is_refused_and_its_connection_closed(how):
    """Its last byte is the first too many, so that all of it is read before the connection is closed."""
    head = b"GET /health HTTP/1.1\r\n" + b"X-A: aaaaaaaaaa\r\n" * 5000
    with running(toy_served(), how=how) as server, raw(server, head[: LARGEST + 1]) as connection:
        answers = connection.makefile("rb")
        status, data = read_answer(answers)
        assert (status, data["error"]["code"], answers.read()) == (431, "too_large", b"")


def test_heads_are_timed_one_by_one_and_apart_from_bodies_and_answers(how):
    """A request that takes longer than a head may, and another on the same connection, whose head does not end."""
    with running(slow_served(), how=how, limits=Limits(body_seconds=0.2)) as server, raw(server, post(LONG)[:-1]) as connection:
        connection.sendall(LONG[-1:])
        answers = connection.makefile("rb")
        assert read_answer(answers)[0] == 200
        connection.sendall(b"GET /health HTT")
        assert read_answer(answers)[0] == 408
        assert answers.read() == b""


def test_a_head_that_begins_while_an_answer_is_on_its_way_is_timed_behind_it(how):
    with running(slow_served(), how=how, limits=Limits(body_seconds=0.2)) as server, begun(server) as connection:
        connection.sendall(HEALTH[:15])
        answers = connection.makefile("rb")
        status, data = read_answer(answers)
        assert (status, len(data["data"])) == (200, 8)
        assert read_answer(answers)[0] == 408
        assert answers.read() == b""


@pytest.mark.parametrize("more", [b"", b"X-A: aaaaaaaaaa\r\n" * 3000])
def test_requests_that_come_while_an_answer_is_on_its_way_are_answered_behind_it(how, more):
    last = HEALTH.replace(b"\r\n", b"\r\n" + more, 1)
    with running(slow_served(), how=how, limits=Limits(body_seconds=0.2)) as server, begun(server) as connection:
        connection.sendall(last)
        answers = connection.makefile("rb")
        assert read_answer(answers)[0] == 200
        assert read_answer(answers) == (200, {"status": "ok"})
        assert answers.read() == b""


def test_what_is_left_of_a_body_that_was_refused_is_timed(how):
    with running(toy_served(), how=how, limits=Limits(body_seconds=0.2)) as server, raw(server, post(b"", 10**9)) as connection:
        answers = connection.makefile("rb")
        assert read_answer(answers)[0] == 413
        connection.sendall(b"a")
        assert answers.read() == b""  # and no second answer to one request


def test_whoever_sends_a_body_that_is_refused_to_its_end_hears_why_and_may_go_on(how):
    with running(toy_served(), how=how, limits=Limits(body=200)) as server, raw(server, post(b"a" * 3_000_000)) as connection:
        answers = connection.makefile("rb")
        assert read_answer(answers)[0] == 413
        connection.sendall(HEALTH)
        assert read_answer(answers) == (200, {"status": "ok"})


def test_a_head_behind_a_body_that_was_refused_is_held_to_its_size(how):
    """h11 holds it to its own limit, and says so; httptools would keep all of it."""
    with running(toy_served(), how=how, limits=Limits(body=200)) as server, raw(server, post(b"", 201)) as connection:
        answers = connection.makefile("rb")
        assert read_answer(answers)[0] == 413
        connection.sendall(b"a" * 201)
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"X-A: aaaaaaaaaa\r\n" * 2_000_000)
