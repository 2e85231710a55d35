"""GPU buffers without torch, on a CUDA runtime that works on host memory; and what is said where there is no GPU."""

import contextlib
import ctypes
import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda

import cachec
from cachec.engines import BACKENDS, cuda_runtime, get_engine
from cachec.engines.cuda_device import CudaDevice, cuda_device
from cachec.engines.ort import GraphedCall, OrtEngine
from cachec.runtime.device import DeviceName, Host
from cachec.runtime.engine import Call, Engine, ExecutionContext, check_bindings
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.session import Session
from cachec.runtime.specs import Signature, TensorSpec
from cachec.runtime.stepper import Stepper

NO_GPU = not any(Path("/dev").glob("nvidia[0-9]*"))


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    return fake


@pytest.fixture
def device(fake):
    return CudaDevice(0)


def test_buffers_hold_what_is_put_into_them(device):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    buffer = device.empty((2, 3, 4), "float32")
    np.testing.assert_array_equal(device.download(buffer), np.zeros((2, 3, 4)))
    device.upload(values.transpose(2, 1, 0).copy().transpose(2, 1, 0), buffer)  # not contiguous
    np.testing.assert_array_equal(device.download(buffer), values)
    copied = device.copy(buffer[1])
    device.upload(-values, buffer)
    np.testing.assert_array_equal(device.download(copied), values[1])
    device.upload(copied, buffer[0])
    np.testing.assert_array_equal(device.download(buffer), [values[1], -values[1]])
    device.synchronize()
    assert device.owns(buffer)
    assert not device.owns(values)
    assert device.record(lambda: None) is None


@pytest.mark.parametrize("index", [0, -1, slice(2, None), slice(-3, -1), slice(3, 1), slice(None, 9)])
def test_slices_are_those_of_numpy(device, index):
    values = np.arange(20, dtype=np.int64).reshape(4, 5)
    buffer = device.empty(values.shape, "int64")
    device.upload(values, buffer)
    part = buffer[index]
    assert part.shape == values[index].shape
    np.testing.assert_array_equal(device.download(part), values[index])


@pytest.mark.parametrize("index", [4, -5, slice(0, 4, 2)])
def test_other_slices_are_refused(device, index):
    with pytest.raises(IndexError, match="out of range for 4 rows|sliced without a step"):
        device.empty((4, 5), "float32")[index]


def test_scalars_and_loops_over_rows(device):
    scalar = device.empty((), "int64")
    device.upload(np.array(7), scalar)
    assert device.download(scalar) == 7
    rows = device.empty((3, 2), "float32")
    device.upload(np.arange(6, dtype=np.float32).reshape(3, 2), rows)
    np.testing.assert_array_equal([device.download(row) for row in rows], [[0, 1], [2, 3], [4, 5]])


def test_rows_of_a_batch_are_gathered_and_scattered_by_copies_on_the_gpu(fake, device):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    buffer = device.empty((4, 3), "float32")
    device.upload(values, buffer)
    fake.log.clear()
    picked = device.gather(buffer, [2, 0, 2])
    device.scatter(picked[:2], [3, 1], buffer)
    assert "cudaStreamSynchronize" not in fake.names()  # only queued
    np.testing.assert_array_equal(device.download(picked), values[[2, 0, 2]])
    np.testing.assert_array_equal(device.download(buffer), values[[0, 0, 2, 2]])
    with pytest.raises(InputError, match="there is no row 4: the buffer has 4 rows"):
        device.gather(buffer, [4])
    assert device.is_finite(buffer)


def test_bfloat16_comes_back_as_float32(device):
    buffer = device.empty((3,), "bfloat16")
    assert buffer.nbytes == 6
    device.upload(np.array([0x3F80, 0xC000, 0x3E20], np.uint16), device.part(buffer, 0, (3,), "uint16"))
    np.testing.assert_array_equal(device.download(buffer), np.array([1, -2, 0.15625], np.float32))


def test_parts_of_one_piece_of_memory(device):
    memory = device.empty((1024,), "uint8")
    part = device.part(memory, 256, (2, 3), "float32")
    assert (part.pointer, part.nbytes, part.shape, part.dtype) == (memory.pointer + 256, 24, (2, 3), "float32")
    device.upload(np.arange(6, dtype=np.float32).reshape(2, 3), part)
    del memory
    gc.collect()
    np.testing.assert_array_equal(device.download(part), [[0, 1, 2], [3, 4, 5]])


def free_bytes(fake):
    return fake.cudaMemGetInfo()[1]


def test_memory_is_given_back_with_the_last_slice(fake, device):
    before = free_bytes(fake)
    row = device.empty((4, 1000), "float32")[2]
    assert free_bytes(fake) == before - 16000
    del row
    gc.collect()
    assert free_bytes(fake) == before


def use_everything():
    device = CudaDevice(0, captures=True).for_session()
    own = device.empty((4,), "float32")
    device.record(lambda: device.upload(own[:2], own[2:])).run()
    own.__dlpack__()


def test_everything_is_given_back(fake):
    use_everything()
    gc.collect()
    assert (fake.blocks, fake.graphs, fake.launchable, fake.events) == ({}, {}, {}, {})
    assert set(fake.streams) == {1, 2}


def test_too_large_a_buffer_says_what_is_free(fake, device):
    with pytest.raises(InputError, match=r"cuda:0 has no room for 40.0 MB more \(16.8 MB are free\): take a smaller batch"):
        device.empty((10_000_000,), "float32")
    fake.fail("cudaMalloc", "cudaErrorMemoryAllocation")
    with pytest.raises(InputError, match="no room for 0.0 MB more"):
        device.empty((1,), "float32")
    assert not fake.blocks


def test_errors_of_cuda_have_their_name_and_text(fake, device):
    fake.fail("cudaStreamSynchronize", "cudaErrorLaunchFailure")
    with pytest.raises(
        EngineError, match=r"CUDA: cudaStreamSynchronize fails with cudaErrorLaunchFailure \(719\): text of Launch"
    ):
        device.synchronize()
    fake.fail("cudaMalloc", "cudaErrorLaunchFailure")
    with pytest.raises(EngineError, match="CUDA: cudaMalloc fails with cudaErrorLaunchFailure"):
        device.empty((1,), "float32")


def test_each_thread_works_on_the_devices_gpu_and_keeps_its_own(monkeypatch):
    fake = FakeCuda(gpus=2)
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    device, found = CudaDevice(1), []

    def work():
        buffer = device.empty((2,), "float32")
        found.extend((fake._block(buffer.pointer, 8).gpu, fake.cudaGetDevice()[1], device.download(buffer).tolist()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1, 0, [0, 0]]
    assert fake.streams[device.stream].gpu == 1


def test_engines_of_onnx_runtime_share_a_stream_and_others_do_not(fake):
    cuda_device.cache_clear()
    shared = cuda_device(DeviceName.parse("cuda"))
    assert cuda_device(DeviceName.parse("cuda:0")) is shared
    assert shared.for_session() is shared
    assert shared.record(lambda: pytest.fail("it must not be carried out")) is None
    cuda_device.cache_clear()
    engines = CudaDevice(0, captures=True)
    one, two = engines.for_session(), engines.for_session()
    assert len({engines.stream, one.stream, two.stream}) == 3
    assert not one.owns(two.empty((1,), "float32"))
    assert fake.names().count("cudaStreamCreateWithFlags") == 4


def test_bindings_take_such_buffers(device):
    signature = Signature((TensorSpec("x", ("batch", 4), "float32"),), (TensorSpec("y", ("batch", 4), "float32"),))
    check_bindings(signature, device, {"x": device.empty((3, 2, 4), "float32")[1]}, {"y": device.empty((2, 4), "float32")})
    with pytest.raises(InputError, match=r"'y' is float16\[2, 4\], expected float32"):
        check_bindings(signature, device, {"x": device.empty((2, 4), "float32")}, {"y": device.empty((2, 4), "float16")})


def array_at(buffer):
    """What lies at a buffer's address."""
    memory = (ctypes.c_byte * buffer.nbytes).from_address(buffer.pointer)
    return np.frombuffer(memory, buffer.dtype).reshape(buffer.shape)


class QueuedEngine(Engine):
    """ONNX Runtime on the CPU, at the addresses of GPU buffers, its calls queued in their stream."""

    name, version, check_target, load = "queued", OrtEngine.version, OrtEngine.check_target, None

    def __init__(self, engine, fake, device):
        super().__init__(engine, engine.signature, device)
        self.fake, self.takes, self.runs = fake, 1000, 0

    def _context(self, native, device):
        assert device is not self.device
        return QueuedContext(self, native.context(), device)


class QueuedContext(ExecutionContext):
    def __init__(self, engine, inner, device):
        self.engine, self.inner, self.device = engine, inner, device

    def scratch_bytes(self, shapes):
        return self.engine.takes

    def bind(self, inputs, outputs):
        assert self.device.owns(self.scratch)
        assert self.scratch.nbytes >= self.engine.takes
        assert self.scratch.pointer % 256 == 0
        check_bindings(self.engine.signature, self.device, inputs, outputs)
        arrays = [{name: array_at(buffer) for name, buffer in side.items()} for side in (inputs, outputs)]
        return QueuedCall(self.engine, self.inner.bind(*arrays), self.device)


class QueuedCall(Call):
    def __init__(self, engine, inner, device):
        self.engine, self.inner, self.device = engine, inner, device

    def run(self):
        self.engine.runs += 1
        self.capturing = self.device.capturing
        if not self.engine.fake.enqueue(self.device.stream, self.inner.run, self.engine.name):
            raise EngineError("the stream is gone")


def request_of(seed):
    return {"prompt": make_noise(5 + seed, (8,))[None]}, make_noise(seed, (6, 8))[None]


@pytest.fixture
def loaded(onnx_toy):
    with cachec.load(onnx_toy) as loaded:
        yield loaded


def queued(loaded, fake):
    device = CudaDevice(0, captures=True)
    return {name: QueuedEngine(engine, fake, device) for name, engine in loaded.engines.items()}


def test_a_session_is_captured_and_replayed(loaded, fake):
    """Nothing waits for the host between the calls, and from the second request on there is one launch."""
    engines = queued(loaded, fake)
    session = Session(engines, loaded.programs["output"], loaded.io)
    for seed in (1, 2, 1, 3):
        fake.log.clear()
        np.testing.assert_array_equal(session.run(*request_of(seed)), loaded.session(level="output").run(*request_of(seed)))
        assert session.recorded == (seed > 1 or fake.names().count("cudaGraphLaunch") == 1)
    calls = sum(map(len, session._instructions)) + 1
    assert sum(engine.runs for engine in engines.values()) == 2 * calls  # one by one, and captured
    assert fake.names() == [*["cudaMemcpyAsync", "cudaStreamSynchronize"] * 2, "cudaGraphLaunch",
                            "cudaMemcpyAsync", "cudaStreamSynchronize"]  # fmt: skip


def test_the_first_request_only_queues(loaded, fake):
    session = Session(queued(loaded, fake), loaded.programs["output"], loaded.io)
    session.begin(*request_of(1))
    fake.log.clear()
    while not session.finished:
        session.advance()
    assert set(fake.names()) == {"queued"}


def test_a_session_has_one_allocation(loaded, fake):
    engines = queued(loaded, fake)
    fake.log.clear()
    session = Session(engines, loaded.programs["output"], loaded.io)
    assert fake.names().count("cudaMalloc") == fake.names().count("cudaMemcpyAsync") == 1
    del session
    gc.collect()
    assert fake.blocks == {}


def test_captured_sessions_do_not_meddle_with_each_other(loaded, fake):
    engines = queued(loaded, fake)
    one, two = (Session(engines, loaded.programs["output"], loaded.io) for _ in range(2))
    for _ in range(3):
        for session, seed in ((one, 1), (two, 2)):
            np.testing.assert_array_equal(session.run(*request_of(seed)), loaded.session(level="output").run(*request_of(seed)))
    assert one.recorded
    assert two.recorded


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("cudaStreamBeginCapture", "cudaErrorStreamCaptureUnsupported"),
        ("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated"),
        ("cudaGraphInstantiate", "cudaErrorMemoryAllocation"),
    ],
)
def test_what_cannot_be_captured_is_said_and_goes_on_one_by_one(loaded, fake, caplog, function, error):
    session = Session(queued(loaded, fake), loaded.programs["output"], loaded.io)
    for seed in (1, 2, 3):
        if seed == 2:
            fake.fail(function, error)
        np.testing.assert_array_equal(session.run(*request_of(seed)), loaded.session(level="output").run(*request_of(seed)))
    assert not session.recorded
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"they cannot be captured as a CUDA graph: CUDA: {function} fails with {error}" in message
    assert fake.graphs == fake.launchable == {}


def test_a_call_that_fails_ends_the_capture(fake):
    device = CudaDevice(0, captures=True)
    buffer, seen = device.empty((2,), "float32"), []

    def work():
        seen.append(device.capturing)
        device.empty((4,), "float32")

    with pytest.raises(
        EngineError, match="captured.*cudaMalloc fails with cudaErrorStreamCapture.*cudaStreamEndCapture: cudaErr"
    ):
        device.record(work)
    assert seen == [True]
    assert not device.capturing
    assert not fake.is_capturing(device.stream)
    np.testing.assert_array_equal(device.download(buffer), [0, 0])
    with pytest.raises(ZeroDivisionError):
        device.record(lambda: 1 / 0)
    assert not fake.is_capturing(device.stream)
    assert fake.graphs == {}


def test_a_launch_that_fails_says_so(loaded, fake):
    session = Session(queued(loaded, fake), loaded.programs["output"], loaded.io)
    for seed in (1, 2):
        session.run(*request_of(seed))
    fake.fail("cudaGraphLaunch", "cudaErrorLaunchFailure")
    with pytest.raises(EngineError, match="CUDA: cudaGraphLaunch fails with cudaErrorLaunchFailure"):
        session.run(*request_of(1))


@pytest.mark.parametrize("capturing", [False, True])
def test_what_is_kept_for_an_owner_outlives_what_is_queued_and_captures(fake, monkeypatch, capturing):
    class Thing:
        pass

    device, owner, thing, order = CudaDevice(0, captures=True), Thing(), Thing(), []
    real = fake.cudaStreamSynchronize
    monkeypatch.setattr(fake, "cudaStreamSynchronize", lambda stream: order.append("waited") or real(stream))
    device.keep(thing, owner=owner)
    alive = weakref.ref(thing, lambda _: order.append("gone"))
    del thing
    with cuda_runtime.keeping() if capturing else contextlib.nullcontext():
        del owner
        assert (alive() is not None) == capturing
    gc.collect()
    assert order == ["waited", "gone"]


def test_memory_that_is_dropped_during_a_capture_is_given_back_after_it(fake):
    device = CudaDevice(0, captures=True)
    others = [device.empty((4,), "float32")]
    assert device.record(others.clear) is not None
    assert fake.blocks == {}
    names = fake.names()
    assert names.index("cudaFree") > names.index("cudaStreamEndCapture")


def test_a_session_that_finds_no_room_says_what_all_of_it_takes(loaded, fake):
    engines = queued(loaded, fake)
    engines["advance"].takes = 10**9
    with pytest.raises(InputError, match=r"cuda:0 has no room for 1000\.\d MB more \(16.8 MB are free\): take a smaller batch"):
        Session(engines, loaded.programs["output"], loaded.io)


def test_onnx_runtime_runs_on_such_buffers(loaded, device):
    """It computes on the CPU here, at the addresses of the device's buffers."""
    device.name = "cpu"
    engines = {name: OrtEngine(engine._native, engine.signature, device) for name, engine in loaded.engines.items()}
    for level, program in loaded.programs.items():
        session = Session(engines, program, loaded.io)
        for seed in (1, 2, 1):
            expected = loaded.session(level=level).run(*request_of(seed))
            np.testing.assert_array_equal(session.run(*request_of(seed)), expected)
        stepper, (conditions, x) = Stepper(engines, program, loaded.io), request_of(1)
        stepper.begin(conditions)
        for step, delta in enumerate(np.diff(program.sigmas)):
            x = x + delta * device.download(stepper.velocity(step, x))
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_a_queued_call_gives_what_a_call_gives(onnx_toy):
    """Its run options are taken; without the CUDA provider there is no graph to make."""
    with cachec.load(onnx_toy) as loaded:
        engine, host = loaded.engines["advance"], Host()
        rng = np.random.default_rng(0)
        shapes = {spec.name: spec.resolve({"batch": 2, "slots": 3}) for spec in engine.signature.inputs}
        inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        out, expected = host.empty((2, 6, 8), "float32"), host.empty((2, 6, 8), "float32")
        call = engine.context().bind(inputs, {"next_latents": expected})
        call.run()
        binding = engine._native.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("next_latents", "cpu", 0, out.dtype, out.shape, out.ctypes.data)
        queued = GraphedCall(engine._native, binding, (out, *inputs.values()))
        for _ in range(3):
            out[:] = 0
            queued.run()
            np.testing.assert_array_equal(out, expected)


LOOKED_FOR = {
    "ort": "CUDAExecutionProvider is not among onnxruntime.get_available_providers",
    "tensorrt-rtx": "there is no NVIDIA driver",
}


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.endswith("tensorrt")])  # those lack a library first
def test_cuda_without_a_gpu_says_what_was_looked_for(backend):
    with pytest.raises(InputError, match=LOOKED_FOR.get(backend, r"torch.cuda.is_available\(\) is False.*--device cpu")):
        get_engine(backend).check_target(DeviceName.parse("cuda"), "float32")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_bundle_for_any_device_asks_for_the_gpu(onnx_toy):
    with pytest.raises(InputError, match="device is cuda:0, but CUDAExecutionProvider is not among"):
        cachec.load(onnx_toy, device="cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_none_is_refused(onnx_toy, device):
    with pytest.raises(InputError, match="use cpu, cuda, or one of several GPUs"):
        cachec.load(onnx_toy, device=device)
