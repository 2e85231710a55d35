"""The fake CUDA runtime beside the real one: it must have what cachec uses, and nothing that cuda-bindings lacks."""

import inspect
import re
from pathlib import Path

import fake_cuda
import pytest
from fake_cuda import FakeCuda

import cachec.engines

runtime = pytest.importorskip("cuda.bindings.runtime")

FUNCTIONS = [name for name, value in vars(FakeCuda).items() if name.startswith("cuda") and inspect.isfunction(value)]
ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode")
USED = sorted({
    name
    for path in Path(cachec.engines.__file__).parent.glob("cuda_*.py")
    for name in re.findall(r"\bcuda[A-Z]\w+", path.read_text())
})  # fmt: skip


def parameters(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_the_real_ones_take(name):
    real, fake = parameters(getattr(runtime, name)), parameters(getattr(FakeCuda, name))
    assert [(p.name, p.kind) for p in fake] == [(p.name, p.kind) for p in real]


@pytest.mark.parametrize("name", ENUMS)
def test_numbers_are_the_real_ones(name):
    for member in getattr(fake_cuda, name):
        real = getattr(getattr(runtime, name), member.name)
        assert (int(real), real.name) == (int(member), member.name)
    for enum in (getattr(runtime, name), getattr(fake_cuda, name)):
        with pytest.raises(TypeError, match="not subscriptable"):
            enum[member.name]


def test_flags_are_the_real_ones():
    for name in ("cudaStreamNonBlocking", "cudaEventDisableTiming"):
        assert getattr(runtime, name) == getattr(fake_cuda, name)


@pytest.mark.parametrize("name", USED)
def test_all_that_is_used_exists_in_both(name):
    for module in (runtime, FakeCuda):
        assert hasattr(module, name) or any(hasattr(getattr(module, enum), name) for enum in ENUMS), (module, name)


HAS_DRIVER = int(runtime.cudaDriverGetVersion()[1]) > 0
WITHOUT = {
    "cudaGetDeviceCount": (),
    "cudaMalloc": (16,),
    "cudaFree": (16,),
    "cudaMemGetInfo": (),
    "cudaGetDeviceProperties": (0,),
    "cudaSetDevice": (0,),
    "cudaStreamCreateWithFlags": (1,),
    "cudaStreamSynchronize": (1,),
    "cudaEventCreateWithFlags": (2,),
    "cudaMemsetAsync": (16, 0, 1, 1),
    "cudaPointerGetAttributes": (16,),
}


@pytest.mark.skipif(HAS_DRIVER, reason="there is a driver")
@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_driver_both_return_the_same(name):
    real, fake = getattr(runtime, name)(*WITHOUT[name]), getattr(FakeCuda(driver=0), name)(*WITHOUT[name])
    assert [None if value is None else int(value) for value in real] == [None if v is None else int(v) for v in fake]


@pytest.mark.skipif(HAS_DRIVER, reason="there is a driver")
def test_bytes_and_numbers_are_what_they_are_in_the_real_one():
    fake = FakeCuda(driver=0)
    for name in ("cudaGetErrorName", "cudaGetErrorString"):
        for module in (runtime, fake):
            code, text = getattr(module, name)(module.cudaError_t.cudaErrorNoDevice)
            assert (int(code), type(text)) == (0, bytes)
    assert runtime.cudaGetErrorName(runtime.cudaError_t(2))[1] == b"cudaErrorMemoryAllocation"
    assert int(runtime.cudaStream_t(7)) == int(fake_cuda.Handle(7)) == 7
    assert isinstance(runtime.cudaDeviceProp().name, bytes)
    assert runtime.cudaDriverGetVersion()[1] == fake.cudaDriverGetVersion()[1] == 0
    assert runtime.cudaRuntimeGetVersion()[1] >= 13000


def test_work_waits_until_it_is_waited_for():
    fake, done = FakeCuda(), []
    streams = [fake.cudaStreamCreateWithFlags(1)[1] for _ in range(2)]
    fake.enqueue(streams[0], lambda: done.append("a"))
    event = fake.cudaEventCreateWithFlags(2)[1]
    fake.cudaEventRecord(event, streams[0])
    fake.enqueue(streams[0], lambda: done.append("later"))
    fake.cudaStreamWaitEvent(streams[1], event, 0)
    fake.enqueue(streams[1], lambda: done.append("b"))
    assert done == []
    fake.cudaStreamSynchronize(streams[1])
    assert done == ["a", "b"]
    fake.cudaStreamSynchronize(streams[0])
    assert done == ["a", "b", "later"]


def test_graphs_do_again_what_was_captured_and_only_that():
    fake, done = FakeCuda(), []
    stream = fake.cudaStreamCreateWithFlags(1)[1]
    fake.cudaStreamBeginCapture(stream, 1)
    fake.enqueue(stream, lambda: done.append("a"))
    error, graph = fake.cudaStreamEndCapture(stream)
    launchable = fake.cudaGraphInstantiate(graph, 0)[1]
    fake.cudaGraphDestroy(graph)
    fake.cudaStreamSynchronize(stream)
    assert (int(error), done) == (0, [])
    for _ in range(2):
        fake.cudaGraphLaunch(launchable, stream)
    fake.cudaStreamSynchronize(stream)
    assert done == ["a", "a"]


@pytest.mark.parametrize(
    "forbidden", [lambda fake, _: fake.cudaMalloc(1), lambda fake, stream: fake.cudaStreamSynchronize(stream)]
)
def test_waiting_or_allocating_breaks_a_capture(forbidden):
    fake = FakeCuda()
    stream = fake.cudaStreamCreateWithFlags(1)[1]
    fake.cudaStreamBeginCapture(stream, 1)
    assert forbidden(fake, stream)[0] is fake_cuda.Error.cudaErrorStreamCaptureUnsupported
    assert fake.cudaStreamEndCapture(stream)[0] is fake_cuda.Error.cudaErrorStreamCaptureInvalidated
    assert fake.cudaStreamSynchronize(stream) == (fake_cuda.OK,)
