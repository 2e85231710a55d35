"""A server in this process on a port of its own, over engines of a few lines of numpy, and what draws their pictures."""

import asyncio
import json
import threading
import time
import zlib
from contextlib import contextmanager
from http.client import HTTPConnection
from types import SimpleNamespace

import numpy as np
import uvicorn
from numpy_engines import IO, SHAPE, WIDTH, compute, make_engines, make_program

from cachec.compiler.tables.lower import lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.bundle import Manifest
from cachec.runtime.errors import EngineError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas
from cachec.runtime.session import LoadedBundle
from cachec.runtime.variants import Variant
from cachec.serving.app import make_app
from cachec.serving.served import Served, name_and_place
from cachec.serving.server import config_of

POISON, MARK = "poison", 50.0  # a prompt, and what is in its condition: the model makes NaN of it
PNG = b"\x89PNG\r\n"  # how such files begin


FACTS = {"levels": {"default": {"psnr_db": 31.5, "psnr_db_stderr": 0.25, "speedup": 1.9, "num_prompts": 4}}}
FOUR = np.linspace(1, 0, 5, dtype=np.float32)


def poisoned(latents, delta, shift, prompt):
    made = compute(latents, delta, shift, prompt)
    made["next_latents"][prompt[:, 0] == MARK] = np.nan
    return made


class Origin:
    """What a bundle with 8 and with 4 steps would be opened from."""

    def __init__(self, frames, engines):
        settings = {
            "height": 16,
            "width": 24,
            "guidance": 1.0,
            "true_cfg_scale": 1.0,
            "steps": 8,
            **({"frames": frames} if frames > 1 else {}),
        }
        four = ProgramKey(4, hash_sigmas(FOUR), {}, level=UNCACHED)
        self.programs = {
            8: {UNCACHED: make_program(UNCACHED), "default": make_program("hidden")},
            4: {UNCACHED: lower_uncached(four, Sampling(FOUR, FOUR[:-1]))},
        }
        levels = {steps: {level: {} for level in programs} for steps, programs in self.programs.items()}
        more = (Variant({**settings, "steps": 4}, levels[4], {}),)
        manifest = Manifest(
            {"name": "numpy"}, IO.to_json(), {"name": "line"}, settings, "", (), levels[8], {}, facts=FACTS, more=more
        )
        self.bundle = SimpleNamespace(manifest=manifest)
        self._engines = make_engines(**{"compute": poisoned, **engines})
        self._target = SimpleNamespace(sizes={"batch": (1, 2, 8)}, shape_bucket=manifest.sizes[0], engines=self._engines)

    def open(self, size=None, steps=None, text=None):
        manifest = self.bundle.manifest.at(size, steps)
        return LoadedBundle(manifest, self.programs[manifest.settings["steps"]], self._engines, self._target, self)

    def close(self):
        pass


def toy_loaded(frames=1, **engines):
    """A loaded bundle; ``engines``: functions that take the place of some of ``numpy_engines``."""
    return Origin(frames, engines).open()


class ToyPictures:
    """Prompts are seeds; a picture is as large as it says, with the latents in its corner."""

    takes_pictures = False

    def __init__(self, loaded):
        settings = loaded.manifest.settings
        frames = settings.get("frames", 1)
        self.shape = (*((frames,) if frames > 1 else ()), settings["height"], settings["width"], 3)

    def conditions(self, prompts, names, scales, negatives=None):
        found = self.encode(prompts)
        return {name: found[name] for name in names}

    def encode(self, prompts):
        rows = [make_noise(zlib.crc32(prompt.encode()), (WIDTH,)) for prompt in prompts]
        rows = [np.full_like(row, MARK) if prompt == POISON else row for row, prompt in zip(rows, prompts, strict=True)]
        return {"prompt": np.stack(rows)}

    def decode(self, latents, *, size=None):
        pictures = np.zeros((len(latents), *self.shape), np.uint8)
        tokens = (127.5 + 40 * latents).clip(0, 255).astype(np.uint8)
        pictures.reshape(len(latents), -1)[:, : tokens[0].size] = tokens.reshape(len(latents), -1)
        return pictures

    def to_png(self, picture):
        return PNG + picture.tobytes()

    def to_mp4(self, frames, fps):
        return b"mp4 of " + repr((frames.shape, fps)).encode()

    def close(self):
        pass


class ToyEncoder(ToyPictures):
    """Pictures are read, too."""

    takes_pictures = True

    def encode_pictures(self, pictures, *, size=None):
        rows = pictures.reshape(len(pictures), -1)[:, : np.prod(SHAPE)].reshape(-1, *SHAPE)
        return (rows.astype(np.float32) - 127.5) / 40


def toy_served(name="toy", pictures=ToyPictures, *, frames=1, engines=None, **options):
    loaded = toy_loaded(frames, **(engines or {}))
    return Served(name, loaded, pictures(loaded), **options)


class Running:
    """``url`` of a server, and its ``desk``. ``how``: as ``config_of`` takes it."""

    def __init__(self, app, **how):
        self.desk = app.state.desk
        config = config_of(app, **how)
        config.port, config.timeout_graceful_shutdown = 0, 5
        self.server, self.app = uvicorn.Server(config), app
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        await self.server.serve()

    @property
    def port(self):
        return self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            self._thread.join(0.005)

    def drain(self):
        """What SIGTERM does, apart from ending the server."""
        return asyncio.run_coroutine_threadsafe(self.desk.drain(), self._loop)

    def stop(self):
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def ask(self, method, path, body=None, **headers):
        """The status, the headers and the body; JSON where it is JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        if isinstance(body, dict | list):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = (answer.headers["content-type"] or "").startswith("application/json")
        return answer.status, answer.headers, json.loads(data) if is_json else data

    def generate(self, prompt="a circle", **fields):
        status, _, data = self.ask("POST", "/v1/images/generations", {"prompt": prompt, **fields})
        return status, data


def form(parts):
    """A body of ``multipart/form-data``, and its type: by name text, or the bytes of a file."""
    body = b""
    for name, value in parts:
        file = '; filename="a"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        body += f'--xx\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--xx--\r\n", "multipart/form-data; boundary=xx"


@contextmanager
def running(*served, how=None, **options):
    one = Running(make_app(served, **options), **(how or {}))
    one.start()
    try:
        yield one
    finally:
        one.stop()


def open_toy(bundle, *, lanes, policy="shortest", strengths=(0.5,), device=None, target=None, weights=None, threads=None):
    """What opens a bundle in a replica, with what ``open_one`` takes: two names, and steps that take a while."""
    assert (device, target, weights, threads) == (None,) * 4, "a toy has no choice of these"
    return toy_served(
        name_and_place(bundle)[0], ToyEncoder, engines={"compute": slow}, lanes=lanes, policy=policy, strengths=strengths
    )


class Switch:
    """A device that can be taken away from what it makes functions of."""

    def __init__(self):
        self.gone = False

    def made(self, function):
        def work(*args, **kwargs):
            if self.gone:
                raise EngineError("CUDA: cudaStreamSynchronize fails with cudaErrorNoDevice (100)")
            return function(*args, **kwargs)

        return work


def open_failing(bundle, *, lanes):
    """One whose device is gone from the first request on."""
    switch = Switch()
    served = toy_served(bundle, engines={"compute": switch.made(compute)}, lanes=lanes)
    switch.gone = True
    return served


def slow(**inputs):
    time.sleep(0.08)
    return poisoned(**inputs)
