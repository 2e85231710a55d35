"""Every back end on a GPU. Without one all of this is skipped; it has not run on hardware yet."""

import numpy as np
import pytest
import torch
from toy_bundle import add_predictor, split_toy, toy_program, write_bundle, write_output_bundle

import cachec
from cachec.compiler.methods.taylor import Taylor
from cachec.engines import BACKENDS, get_backend
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session

GPU = DeviceName("cuda")
CUTS = ("hidden", "output")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def write(path, backend, cut, device=GPU):
    split = split_toy(head_axis=True)
    if cut == "output":
        return write_output_bundle(split, path, backend, device=device)
    method = Taylor(order=1)
    graphs = add_predictor(split, method.predictor(None), method.window)
    return write_bundle(graphs, toy_program(graphs), method, path, backend, device=device)


@pytest.fixture(scope="module", params=[(b, c) for b in BACKENDS for c in CUTS], ids=lambda pair: "-".join(pair))
def pair(request, tmp_path_factory):
    """The same bundle on the CPU, op by op, and on the GPU with the back end in question."""
    name, cut = request.param
    work, backend = tmp_path_factory.mktemp("bundles"), get_backend(name)
    try:
        backend.check_target(GPU, "float32")
    except InputError as error:
        pytest.skip(str(error))
    reference = write(work / "eager", get_backend("eager"), cut, DeviceName("cpu"))
    with cachec.load(reference) as wanted, cachec.load(write(work / name, backend, cut), device="cuda") as loaded:
        yield wanted, loaded


def request_of(*seeds):
    prompts = np.stack([make_noise(100 + seed, (8,)) for seed in seeds])
    return {"prompt": prompts}, np.stack([make_noise(seed, (6, 8)) for seed in seeds])


@pytest.mark.parametrize("level", ["default", UNCACHED])
def test_latents_equal_those_of_the_cpu(pair, level):
    """In the first request, which makes calls one by one, and in later ones, which are recorded."""
    wanted, loaded = pair
    session = loaded.session(batch=2, level=level)
    for seeds in ((1, 2), (3, 4), (5, 6), (1, 2)):
        expected = wanted.session(batch=2, level=level).run(*request_of(*seeds))
        np.testing.assert_allclose(session.run(*request_of(*seeds)), expected, atol=1e-4, rtol=1e-4)
    assert session.recorded == (loaded.manifest.targets[0].backend != "ort")


def test_sessions_do_not_meddle_with_each_other(pair):
    _, loaded = pair
    one, two = loaded.session(), loaded.session()
    first = [one.run(*request_of(1)) for _ in range(3)]
    for _ in range(3):
        two.run(*request_of(2))
        np.testing.assert_array_equal(one.run(*request_of(1)), first[-1])


def test_steps_one_by_one(pair):
    wanted, loaded = pair
    session = loaded.session()
    session.begin(*request_of(1))
    while not session.finished:
        session.advance()
    np.testing.assert_allclose(session.latents, wanted.session().run(*request_of(1)), atol=1e-4, rtol=1e-4)


def test_more_than_there_is(pair):
    _, loaded = pair
    with pytest.raises(InputError, match=r"cuda:0 has no room for .* MB more \(.* MB are free\)"):
        Session(loaded.engines, loaded.programs["default"], loaded.io, batch=2**31)
