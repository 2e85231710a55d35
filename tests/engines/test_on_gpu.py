"""Every back end on a GPU, and a pipeline that lies there. Without one all of this is skipped."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from toy_bundle import split_toy, toy_program, write_bundle, write_output_bundle

import cachec
from cachec.compiler.graphs.prepare import linear
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.models import TINY_FLUX_DIR
from cachec.engines import BACKENDS, cuda_runtime, get_engine
from cachec.engines.cuda_device import CudaDevice
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import EngineError, InputError, MissingExtraError
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
    graphs = linear(split)
    return write_bundle(graphs, toy_program(), method, path, backend, device=device)


@pytest.fixture(scope="module", params=[(b, c) for b in BACKENDS for c in CUTS], ids=lambda pair: "-".join(pair))
def pair(request, tmp_path_factory):
    """The same bundle on the CPU, op by op, and on the GPU with the back end in question."""
    name, cut = request.param
    work = tmp_path_factory.mktemp("bundles")
    try:
        get_engine(name).check_target(GPU, "float32")
    except (InputError, MissingExtraError) as error:
        pytest.skip(str(error))
    reference = write(work / "reference", "eager", cut, DeviceName("cpu"))
    with cachec.load(reference) as wanted, cachec.load(write(work / name, name, cut), device="cuda") as loaded:
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
    assert session.recorded == (not loaded.target.backend.startswith("ort"))


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


def test_steps_one_by_one_do_not_disturb_recorded_requests(pair):
    """Both record graphs of the same execution contexts."""
    _, loaded = pair
    session, other = loaded.session(), loaded.session()
    wanted = [session.run(*request_of(1)) for _ in range(3)][-1]
    for _ in range(3):
        for one in (session, other):
            one.begin(*request_of(2))
            while not one.finished:
                one.advance()
        np.testing.assert_array_equal(session.latents, other.latents)
        np.testing.assert_array_equal(session.run(*request_of(1)), wanted)


def test_more_than_there_is(pair, monkeypatch):
    _, loaded = pair
    monkeypatch.setattr("cachec.runtime.binding.MAX_BATCH", 2**31)
    with pytest.raises(InputError, match=r"cuda:0 has no room for .* MB more \(.* MB are free\)"):
        Session(loaded.engines, loaded.programs["default"], loaded.io, batch=2**31)


class OtherLibrary:
    """An array of a library that only speaks DLPack."""

    def __init__(self, array):
        self.tensor = torch.from_numpy(array).cuda()
        self.__dlpack__, self.__dlpack_device__ = self.tensor.__dlpack__, self.tensor.__dlpack_device__


def test_arrays_of_other_libraries_and_results_that_stay_there(pair):
    _, loaded = pair
    session = loaded.session()
    conditions, noise = request_of(1)
    wanted = session.run(conditions, noise)
    given = {name: OtherLibrary(value) for name, value in conditions.items()}
    for _ in range(3):
        kept = torch.from_dlpack(session.run(given, OtherLibrary(noise), on_device=True))
        session.run(*request_of(2))
        assert kept.is_cuda
        np.testing.assert_allclose(kept.cpu().numpy(), wanted, atol=1e-6, rtol=1e-6)


@pytest.fixture
def device():
    pytest.importorskip("cuda.bindings.runtime")
    return CudaDevice(0, captures=True).for_session()


def test_memory_without_torch(device):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    memory = device.empty((1 << 20,), "uint8")
    assert memory.pointer % 256 == 0
    assert not device.download(memory).any()
    part = device.part(memory, 256, (3, 4), "float32")
    device.upload(values, part)
    np.testing.assert_array_equal(device.download(device.copy(part[1:])), values[1:])
    np.testing.assert_array_equal(torch.from_dlpack(part).cpu().numpy(), values)
    np.testing.assert_array_equal(torch.as_tensor(part, device="cuda").cpu().numpy(), values)
    twice = torch.full((3, 4), 2.0, device="cuda") * torch.from_numpy(values).cuda()
    device.upload(device.adopt(twice), part)
    np.testing.assert_array_equal(device.download(part), 2 * values)
    with pytest.raises(InputError, match=r"cuda:0 has no room for .* MB more \(.* MB are free\)"):
        device.empty((1 << 50,), "uint8")


def test_copies_are_captured_and_replayed(device):
    source, target = device.empty((4,), "float32"), device.empty((4,), "float32")
    replay = device.record(lambda: device.upload(source, target))
    for value in (1, 2):
        device.upload(np.full(4, value, np.float32), source)
        assert (device.download(target) == value - 1).all()  # nothing is carried out by capturing
        replay.run()
        assert (device.download(target) == value).all()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(device):
    source, target = device.empty((4,), "float32"), device.empty((4,), "float32")
    with pytest.raises(EngineError, match="they cannot be captured as a CUDA graph: CUDA: cudaStreamSynchronize fails with"):
        device.record(device.synchronize)
    device.upload(np.ones(4, np.float32), source)
    device.record(lambda: device.upload(source, target)).run()
    assert (device.download(target) == 1).all()


def test_facts_are_those_that_torch_knows():
    pytest.importorskip("cuda.bindings.runtime")
    assert cuda_runtime.compute_capability(0) == torch.cuda.get_device_capability(0)
    assert cuda_runtime.gpu_name(0) == torch.cuda.get_device_name(0)
    assert cuda_runtime.memory_bytes(0)[1] == torch.cuda.mem_get_info(0)[1]
    assert cuda_runtime.driver_version() >= (12, 0)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_a_pipeline_is_accelerated_where_it_is(dtype, apart):
    def accelerated(device):
        pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR, local_files_only=True).to(device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        del pipeline.transformer.transformer_blocks[1:], pipeline.transformer.single_transformer_blocks[1:]
        return cachec.accelerate(pipeline, method="taylor", steps=6, schedule="0,1,2,4", compiled=False)

    def run(pipeline):
        call = {"height": 128, "width": 128, "num_inference_steps": 6, "max_sequence_length": 24, "output_type": "latent"}
        return pipeline("a sad face", **call, generator=torch.Generator().manual_seed(0)).images

    pipeline = accelerated("cuda")
    got, wanted = run(pipeline), run(accelerated("cpu")).float()
    assert got.is_cuda
    assert (got.cpu().float() - wanted).norm() / wanted.norm() < apart
    assert torch.equal(run(pipeline), got)
