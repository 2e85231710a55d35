"""What a server says of its engines: a GPU that is gone fails every request, and health tells until it is back."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy_engines import compute
from toy_server import POISON, Switch, ToyEncoder, ToyPictures, form, running, toy_served

from cachec.pictures.files import to_png
from cachec.pictures.generator import Generator
from cachec.serving.health import IN_A_ROW


def served(switch, where):
    """A bundle whose denoiser, text encoder or decoder is on the device of ``switch``."""
    if where == "compute":
        return toy_served(engines={"compute": switch.made(compute)})
    return toy_served(pictures=type("Pictures", (ToyPictures,), {where: switch.made(getattr(ToyPictures, where))}))


def health(server):
    return server.ask("GET", "/health")[::2]


OK, BROKEN = (200, {"status": "ok"}), (503, {"status": "broken"})


@pytest.mark.parametrize("where", ["compute", "encode", "decode"])
def test_a_device_that_is_gone_turns_health_until_it_is_back(caplog, where):
    switch = Switch()
    with running(served(switch, where)) as server:
        wanted = server.generate(seed=1)
        assert (wanted[0], health(server)) == (200, OK)
        switch.gone = True
        for place in range(IN_A_ROW + 2):
            status, data = server.generate(n=2)
            assert (status, data["error"]["code"], data["error"]["type"]) == (500, "engine_failed", "server_error")
            assert "cudaStreamSynchronize fails with cudaErrorNoDevice (100)" in data["error"]["message"]
            assert health(server) == (OK if place + 1 < IN_A_ROW else BROKEN)
        switch.gone = False
        assert server.generate(seed=1)[1]["data"] == wanted[1]["data"]
        assert health(server) == OK
    told = [one.getMessage() for one in caplog.records if one.name == "cachec.serving.health"]
    assert len(told) == 2
    assert told[0].startswith(f"the engines of toy failed {IN_A_ROW} requests in a row, the last one so: ")
    assert "cudaErrorNoDevice (100). /health says broken until they make one again: see whether" in told[0]
    assert told[1] == f"the engines of toy work again, after {IN_A_ROW + 2} failed requests"


def test_failures_with_one_made_between_them_are_the_requests_own():
    switch = Switch()
    with running(served(switch, "compute")) as server:
        for gone in (True,) * (IN_A_ROW - 1) + (False,) + (True,) * (IN_A_ROW - 1):
            switch.gone = gone
            assert server.generate()[0] == (500 if gone else 200)
        assert health(server) == OK


def test_what_clients_ask_for_never_turns_health(toy):
    for _ in range(IN_A_ROW + 1):
        assert toy.generate(POISON)[0] == 500
        assert toy.generate(n=99)[0] == 400
    assert health(toy) == OK


class Overflowing(ToyEncoder):
    """The generator's own ``decode`` and ``encode_pictures``, of engines that make NaN from ``begin`` on."""

    overflows = False

    def __init__(self, loaded):
        super().__init__(loaded)
        part = SimpleNamespace(engines=("24x16",), run=lambda size, inputs: {"made": np.full((1, 2), np.nan)})
        self.generator = Generator.__new__(Generator)
        facts = SimpleNamespace(decoder="part", encoder="part")
        vars(self.generator).update(_facts=facts, _parts={"part": part}, _keep=("part",))

    def decode(self, latents, *, size=None):
        return (self.generator if self.overflows else super()).decode(latents, size=size)

    def encode_pictures(self, pictures, *, size=None):
        return (self.generator if self.overflows else super()).encode_pictures(pictures, size=size)


def test_no_more_does_what_a_decoder_or_an_encoder_makes_nan_of():
    served = toy_served(pictures=Overflowing)
    body, kind = form([("prompt", "a"), ("image", to_png(np.zeros((16, 24, 3), np.uint8)))])
    with running(served) as server:
        assert server.generate()[0] == 200
        served.pictures.overflows = True
        for _ in range(IN_A_ROW + 1):
            for status, data in (server.generate(),
                                 server.ask("POST", "/v1/images/edits", body, **{"Content-Type": kind})[::2]):  # fmt: skip
                assert (status, data["error"]["code"]) == (500, "engine_failed")
                assert "results of part at 24x16 hold NaN or infinity" in data["error"]["message"]
        assert health(server) == OK


def test_one_bundle_of_two_is_enough():
    switch = Switch()
    with running(toy_served("good"), toy_served("bad", engines={"compute": switch.made(compute)})) as server:
        switch.gone = True
        for _ in range(IN_A_ROW):
            assert [server.generate(model=name)[0] for name in ("bad", "good")] == [500, 200]
        assert health(server) == BROKEN
