"""``cachec serve`` as it is called: what is refused before anything is opened, and where it listens."""

import re
import socket
from pathlib import Path

import pytest
from toy_product import run_cli
from toy_server import toy_served

from cachec.runtime.errors import InputError, OutputError
from cachec.serving import server
from cachec.serving.command import read_key
from cachec.serving.guard import is_loopback
from cachec.serving.served import from_anywhere, name_and_place
from cachec.serving.server import open_all, serve


def test_nothing_to_serve_is_told():
    assert run_cli("serve") == (3, "error: there is nothing to serve: name a bundle\n")


def test_a_limit_that_allows_nothing_is_told(tmp_path):
    code, output = run_cli("serve", tmp_path, "--max-queue", "-1")
    assert (code, output) == (3, "error: the limit queue is -1; it must be 0 or more\n")


def test_what_is_no_bundle_is_told(tmp_path):
    code, output = run_cli("serve", tmp_path)
    assert code == 6
    assert output.startswith("error: ")


def test_two_bundles_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="two bundles are called a, and requests could not tell them apart"):
        open_all([tmp_path / "a.cachec", tmp_path / "other" / "a"])
    with pytest.raises(InputError, match="two bundles are called a, and .*: rename one, or write NAME=BUNDLE"):
        open_all([tmp_path / "a.cachec", f"a={tmp_path / 'b.cachec'}"])


def test_a_bundle_is_called_as_is_said_or_as_its_directory(tmp_path):
    (tmp_path / "rate=1").mkdir()
    assert name_and_place(tmp_path / "flux.cachec") == ("flux", tmp_path / "flux.cachec")
    assert name_and_place(tmp_path / "rate=1") == ("rate=1", tmp_path / "rate=1")
    assert name_and_place("org/flux-1=rate=1/flux.cachec") == ("org/flux-1", Path("rate=1/flux.cachec"))
    for bundle in (
        tmp_path / "rate=1",
        tmp_path / "rate=1" / "flux.cachec",
        f"org/flux-1={tmp_path / 'rate=1'}",
        "flux.cachec",
    ):
        name, place = name_and_place(bundle)
        assert name_and_place(from_anywhere(bundle)) == (name, place.resolve())
    for nothing in ("=flux.cachec", "flux="):
        with pytest.raises(InputError, match=f"{nothing}: write NAME=BUNDLE, or the bundle alone"):
            name_and_place(nothing)


def test_the_key_is_a_files_first_line_or_the_environments(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text(" secret \nand more")
    monkeypatch.setenv("CACHEC_API_KEY", "other")
    assert (read_key(file), read_key(None)) == ("secret", "other")
    monkeypatch.delenv("CACHEC_API_KEY")
    assert read_key(None) is None
    file.write_text("\nsecret")
    with pytest.raises(InputError, match="the first line of .*key is empty"):
        read_key(file)
    with pytest.raises(InputError, match="the API key cannot be read from .*nowhere"):
        read_key(tmp_path / "nowhere")


def test_which_addresses_are_this_machines_alone():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [True] * 3 + [
        False
    ] * 2


def test_it_listens_on_loopback_alone_with_the_limits_that_it_is_told(tmp_path, monkeypatch):
    """All but the loop is real: what runs it looks at its socket."""
    monkeypatch.setattr(server, "open_all", lambda bundles, **options: [toy_served()])
    reached = {}

    def look(self, sockets):
        (one,) = sockets
        for host in ("127.0.0.1", "127.0.0.2"):  # the latter answers those who listen everywhere
            try:
                socket.create_connection((host, one.getsockname()[1]), timeout=5).close()
                reached[host] = self._desk.limits.pixels
            except OSError:
                reached[host] = None
        reached["http"] = self.config.http.__name__
        one.close()

    monkeypatch.setattr(server.Server, "run", look)
    code, output = run_cli("serve", tmp_path, "--port", 0, "--max-pixels", 768)
    assert (code, reached) == (0, {"127.0.0.1": 768, "127.0.0.2": None, "http": "Heads"})
    assert re.fullmatch(r"serving toy on http://127\.0\.0\.1:\d+\n", output)


def test_an_address_that_is_taken_is_told(toy):
    with pytest.raises(OutputError, match=rf"the server cannot listen on 127.0.0.1:{toy.port} \(.*in use"):
        serve(toy.app, port=toy.port)
