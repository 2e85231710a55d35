"""GPU buffers without torch, on a driver library that works on host memory; and what is said where there is no GPU."""

import gc
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import split_toy, write_output_bundle

import cachec
from cachec.engines import BACKENDS, get_backend
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.ort import GraphedCall, OrtEngine
from cachec.runtime.device import DeviceName, Host
from cachec.runtime.engine import check_bindings
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.session import Session
from cachec.runtime.specs import Signature, TensorSpec

SOURCE = Path(__file__).parent / "host_as_gpu.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
NO_GPU = not any(Path("/dev").glob("nvidia[0-9]*"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    out = tmp_path_factory.mktemp("driver") / "libhost_as_gpu.so"
    subprocess.run([COMPILER, "-x", "c", "-shared", "-fPIC", "-o", str(out), str(SOURCE)], check=True)
    return str(out)


@pytest.fixture
def device(library):
    return CudaDevice(0, library)


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


@pytest.mark.parametrize("index", [0, 3, -1, slice(0, 2), slice(2, None), slice(-3, -1), slice(3, 1), slice(None, 9)])
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


def test_bfloat16_comes_back_as_float32(device):
    buffer = device.empty((3,), "bfloat16")
    assert buffer.nbytes == 6
    bits = device.empty((3,), "uint16")
    device.upload(np.array([0x3F80, 0xC000, 0x3E20], np.uint16), bits)
    device._driver.copy("DtoD", buffer.pointer, bits.pointer, 6)
    np.testing.assert_array_equal(device.download(buffer), np.array([1, -2, 0.15625], np.float32))


def test_memory_is_given_back_with_the_last_slice(device):
    before = device._driver.free_bytes()
    row = device.empty((4, 1000), "float32")[2]
    assert device._driver.free_bytes() == before - 16000
    del row
    gc.collect()
    assert device._driver.free_bytes() == before


def test_too_large_a_buffer_says_what_is_free(device):
    with pytest.raises(InputError, match=r"cuda:0 has no room for 40.0 MB more \(16.8 MB are free\)"):
        device.empty((10_000_000,), "float32")


def test_errors_of_the_driver_have_their_text(device):
    device._driver.stream += 1
    with pytest.raises(EngineError, match="CUDA driver: cuStreamSynchronize fails with error 201: invalid device context"):
        device.synchronize()


def test_every_thread_gets_the_context(device):
    buffer, found = device.empty((2,), "float32"), []
    thread = threading.Thread(target=lambda: found.append(device.download(buffer)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found, [[0, 0]])


def test_gpus_that_are_not_there(library):
    with pytest.raises(InputError, match="device is cuda:1, but there are 1 GPUs, counted from 0"):
        CudaDevice(1, library)
    with pytest.raises(InputError, match="NVIDIA's driver library libnothing.so cannot be loaded"):
        CudaDevice(0, "libnothing.so")


def test_bindings_take_such_buffers(device):
    signature = Signature((TensorSpec("x", ("batch", 4), "float32"),), (TensorSpec("y", ("batch", 4), "float32"),))
    check_bindings(signature, device, {"x": device.empty((3, 2, 4), "float32")[1]}, {"y": device.empty((2, 4), "float32")})
    with pytest.raises(InputError, match=r"'y' is float16\[2, 4\], expected float32"):
        check_bindings(signature, device, {"x": device.empty((2, 4), "float32")}, {"y": device.empty((2, 4), "float16")})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "output"
    return write_output_bundle(split_toy(head_axis=True), out, OrtEngine)


def test_sessions_run_on_such_buffers(bundle, device):
    """ONNX Runtime computes on the CPU here, at the addresses of the device's buffers."""
    device.name = "cpu"
    conditions = {"prompt": make_noise(5, (8,))[None]}
    with cachec.load(bundle) as loaded:
        engines = {name: OrtEngine(engine._native, engine.signature, device) for name, engine in loaded.engines.items()}
        for level, program in loaded.programs.items():
            session = Session(engines, program, loaded.io)
            for seed in (1, 2, 1):
                noise = make_noise(seed, (6, 8))[None]
                expected = loaded.session(level=level).run(conditions, noise)
                np.testing.assert_array_equal(session.run(conditions, noise), expected)
        with pytest.raises(InputError, match="cannot calculate with GPU buffers of the ort backend"):
            Session(engines, loaded.programs["default"], loaded.io, for_sampler=True)


def test_a_queued_call_gives_what_a_call_gives(bundle):
    """Its run options are taken; without the CUDA provider there is no graph to make."""
    with cachec.load(bundle) as loaded:
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


LOOKED_FOR = {"ort": "CUDAExecutionProvider is not among onnxruntime.get_available_providers"}


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_without_a_gpu_says_what_was_looked_for(backend):
    with pytest.raises(InputError, match=LOOKED_FOR.get(backend, r"torch.cuda.is_available\(\) is False") + ".*--device cpu"):
        get_backend(backend).check_target(DeviceName.parse("cuda"), "float32")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_bundle_for_any_device_asks_for_the_gpu(bundle):
    with pytest.raises(InputError, match="device is cuda:0, but CUDAExecutionProvider is not among"):
        cachec.load(bundle, device="cuda")


def test_onnx_runtime_has_no_bfloat16_on_the_cpu():
    with pytest.raises(InputError, match="bfloat16.*use --device cuda or float16"):
        OrtEngine.check_target(DeviceName("cpu"), "bfloat16")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_none_is_refused(bundle, device):
    with pytest.raises(InputError, match="use cpu, cuda, or one of several GPUs"):
        cachec.load(bundle, device=device)
