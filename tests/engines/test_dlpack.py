"""DLPack with numpy and torch on CPU memory, which is real; and GPU buffers on the fake CUDA runtime, lent both ways."""

import ctypes
import gc
import sys
import weakref

import numpy as np
import pytest
from fake_cuda import FakeCuda

import cachec
from cachec.engines import cuda_runtime, dlpack
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.ort import OrtEngine
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.session import Session

torch = pytest.importorskip("torch")

CPU = (dlpack.CPU, 0)
DTYPES = ("float32", "float16", "int64", "bool", "complex64")


class Lender:
    """Lends an array's memory as cachec does."""

    def __init__(self, array, dtype=None, versioned=False):
        self.array, self.dtype, self.versioned = array, dtype or str(array.dtype), versioned

    def __dlpack_device__(self):
        return CPU

    def __dlpack__(self, **options):
        array = self.array
        return dlpack.lend(self, array.ctypes.data, array.shape, self.dtype, CPU, versioned=self.versioned)


def some(dtype, shape=(2, 3, 4)):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("take", [np.from_dlpack, torch.from_dlpack])
def test_others_take_what_is_lent(take, dtype, versioned):
    array = some(dtype)
    taken = take(Lender(array, versioned=versioned))
    assert str(taken.dtype).removeprefix("torch.") == dtype
    np.testing.assert_array_equal(np.asarray(taken), array)
    array[1, 2, 3] += np.asarray(1, dtype)
    np.testing.assert_array_equal(np.asarray(taken), array)  # the same memory


@pytest.mark.parametrize("shape", [(), (1,), (3, 0, 2), (1, 5)])
def test_any_shape_is_lent_and_borrowed(shape):
    array = some("float32", shape)
    np.testing.assert_array_equal(torch.from_dlpack(Lender(array)).numpy(), array)
    loan = dlpack.borrow(array)
    assert (loan.shape, loan.dtype, loan.device, loan.is_contiguous) == (shape, "float32", CPU, True)


def test_bfloat16_goes_both_ways():
    bits = np.array([0x3F80, 0xC000], np.uint16)
    taken = torch.from_dlpack(Lender(bits, "bfloat16"))
    assert taken.dtype == torch.bfloat16
    assert taken.tolist() == [1, -2]
    assert dlpack.borrow(taken).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [np.array, torch.from_numpy])
def test_what_others_lend_is_read_where_it_lies(make, dtype):
    array = make(some(dtype))
    loan = dlpack.borrow(array)
    assert (loan.shape, loan.dtype, loan.device, loan.is_contiguous) == ((2, 3, 4), dtype, CPU, True)
    read = np.frombuffer((ctypes.c_byte * array.nbytes).from_address(loan.pointer), dtype)
    np.testing.assert_array_equal(read, some(dtype).ravel())
    assert dlpack.borrow(array[1]).pointer == loan.pointer + array[1].nbytes


def test_strides_are_looked_at():
    assert not dlpack.borrow(some("float32").transpose(1, 0, 2)).is_contiguous
    assert not dlpack.borrow(torch.zeros(4, 6)[:, :3]).is_contiguous
    assert not dlpack.borrow(torch.zeros(4).expand(3, 4)).is_contiguous
    assert dlpack.borrow(torch.zeros(4, 6)[2:3, :3]).is_contiguous  # one row
    assert dlpack.borrow(torch.zeros(3, 1, 5).transpose(0, 1)).is_contiguous


class Old(Lender):
    """From before versions."""

    def __dlpack__(self, stream=None):
        return super().__dlpack__()


class Refusing(Lender):
    def __dlpack__(self, **options):
        raise BufferError("not mine to lend")


def test_old_and_unwilling_lenders():
    assert dlpack.borrow(Old(some("float32"))).shape == (2, 3, 4)
    with pytest.raises(InputError, match="a Refusing cannot be borrowed: not mine to lend"):
        dlpack.borrow(Refusing(some("float32")))
    with pytest.raises(InputError, match="a Tensor cannot be borrowed"):
        dlpack.borrow(torch.zeros(2, requires_grad=True))


class Odd:
    def __dlpack__(self, **options):
        capsule = dlpack.lend(self, 0, (1,), "float32", CPU)
        dlpack._tensor(capsule).dtype.code = 10  # a float of eight bits
        return capsule


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(InputError, match="DLPack's type 10 with 32 bits and 1 lanes"):
        dlpack.borrow(Odd())


@pytest.mark.parametrize("versioned", [False, True])
def test_what_is_lent_lives_until_the_borrower_is_done(versioned):
    array = some("float32")
    lender = Lender(array, versioned=versioned)
    alive = weakref.ref(lender)
    taken = torch.from_dlpack(lender)
    capsule = lender.__dlpack__()  # one that nobody takes
    del lender
    gc.collect()
    assert alive() is not None
    del taken
    gc.collect()
    assert alive() is not None
    del capsule
    gc.collect()
    assert alive() is None


def test_a_capsule_that_goes_away_loses_no_exception():
    def fail():
        capsule = Lender(some("float32")).__dlpack__()
        raise ZeroDivisionError(capsule is None)

    with pytest.raises(ZeroDivisionError):
        fail()


def test_what_is_borrowed_is_given_back():
    array = np.zeros(4)
    before = sys.getrefcount(array)
    loans = [dlpack.borrow(array) for _ in range(3)]
    assert sys.getrefcount(array) == before + 3
    loans.clear()
    assert sys.getrefcount(array) == before


# GPU buffers, on the fake runtime


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda(gpus=2)
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    return fake


@pytest.fixture
def device(fake):
    return CudaDevice(0)


class Producer:
    """Another library on the GPU: its values are only queued, in a stream of its own."""

    def __init__(self, fake, values, index=0):
        self.fake, self.index, self.shape, self.dtype = fake, index, values.shape, values.dtype
        fake.cudaSetDevice(index)
        self.stream = int(fake.cudaStreamCreateWithFlags(1)[1])
        self.pointer = fake.cudaMalloc(values.nbytes)[1]
        fake.cudaSetDevice(0)
        fake.enqueue(self.stream, lambda: ctypes.memmove(self.pointer, values.ctypes.data, values.nbytes), "produce")

    def spoil(self):
        self.fake.enqueue(self.stream, lambda: ctypes.memset(self.pointer, 255, 4), "spoil")
        self.fake.flush(self.stream)


class ByDlpack(Producer):
    def __dlpack_device__(self):
        return dlpack.CUDA, self.index

    def __dlpack__(self, *, stream=None, max_version=None):
        event = self.fake.cudaEventCreateWithFlags(2)[1]
        self.fake.cudaEventRecord(event, self.stream)
        self.fake.cudaStreamWaitEvent(stream, event, 0)
        return dlpack.lend(self, self.pointer, self.shape, str(self.dtype), self.__dlpack_device__())


class ByInterface(Producer):
    @property
    def __cuda_array_interface__(self):
        data, kind = (self.pointer, False), self.dtype.str
        return {"shape": self.shape, "typestr": kind, "data": data, "version": 3, "stream": self.stream, "strides": None}


PRODUCERS = pytest.mark.parametrize("producer", [ByDlpack, ByInterface])


@PRODUCERS
def test_arrays_of_other_libraries_are_copied_when_they_are_ready(fake, device, producer):
    values = some("float32")
    given = producer(fake, values)
    adopted, buffer = device.adopt(given), device.empty((2, 3, 4), "float32")
    assert (adopted.pointer, adopted.shape, adopted.dtype) == (given.pointer, (2, 3, 4), "float32")
    device.upload(adopted, buffer)
    given.spoil()  # at once: the copy must be over
    np.testing.assert_array_equal(device.download(buffer), values)


@PRODUCERS
def test_arrays_on_another_gpu_are_refused(fake, device, producer):
    with pytest.raises(InputError, match=rf"a {producer.__name__} lies on cuda:1, and this session is on cuda:0: move it"):
        device.adopt(producer(fake, some("float32"), index=1))


def test_arrays_with_gaps_are_refused(fake, device):
    class Strided(ByInterface):
        @property
        def __cuda_array_interface__(self):
            return {**super().__cuda_array_interface__, "strides": (4, 8, 24)}

    with pytest.raises(InputError, match=r"a Strided of shape \[2, 3, 4\] is not contiguous"):
        device.adopt(Strided(fake, some("float32")))


def test_what_is_on_the_host_or_the_devices_own_stays_as_it_is(device):
    for value in (some("float32"), torch.zeros(3), device.empty((2,), "float32"), "text"):
        assert device.adopt(value) is value


def test_buffers_of_another_session_are_borrowed(fake):
    one, two = (CudaDevice(0, captures=True).for_session() for _ in range(2))
    source, target = one.empty((3,), "float32"), two.empty((3,), "float32")
    fake.enqueue(one.stream, lambda: ctypes.memmove(source.pointer, some("float32", (3,)).ctypes.data, 12))
    two.upload(two.adopt(source), target)
    np.testing.assert_array_equal(two.download(target), [0, 1, 2])


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 3)])
def test_buffers_are_lent_behind_what_is_queued(fake, device, max_version):
    stream = int(fake.cudaStreamCreateWithFlags(1)[1])
    buffer, seen = device.empty((2, 3), "float32")[1], []
    fake.enqueue(device.stream, lambda: ctypes.memmove(buffer.pointer, some("float32", (3,)).ctypes.data, 12))
    assert buffer.__dlpack_device__() == (2, 0)
    capsule = buffer.__dlpack__(stream=stream, max_version=max_version)
    name = dlpack.VERSIONED_NAME if max_version and max_version[0] else dlpack.NAME
    kind = dlpack._Versioned if max_version and max_version[0] else dlpack._Managed
    tensor = kind.from_address(dlpack._pointer(capsule, name)).tensor
    assert (tensor.data, tensor.shape[0], tensor.ndim) == (buffer.pointer, 3, 1)
    fake.enqueue(stream, lambda: seen.extend((ctypes.c_float * 3).from_address(tensor.data)))
    fake.cudaStreamSynchronize(stream)
    assert seen == [0, 1, 2]


def test_the_stream_that_waits_is_the_one_that_was_named(fake, device):
    buffer = device.empty((2,), "float32")
    for given, waits in ((None, [1]), (2, [2]), (-1, []), (device.stream, [])):
        fake.log.clear()
        buffer.__dlpack__(stream=given)
        assert [entry[1] for entry in fake.log if entry[0] == "cudaStreamWaitEvent"] == waits
    assert fake.events == {}


def test_a_lent_buffer_keeps_its_memory(fake, device):
    capsule = device.empty((4,), "float32").__dlpack__()
    gc.collect()
    assert len(fake.blocks) == 1
    del capsule
    gc.collect()
    assert fake.blocks == {}


def test_a_buffer_can_be_lent_as_a_copy_but_not_elsewhere(fake, device):
    buffer = device.empty((4,), "float32")
    copied = buffer.__dlpack__(copy=True)
    assert dlpack._Managed.from_address(dlpack._pointer(copied, dlpack.NAME)).tensor.data != buffer.pointer
    with pytest.raises(BufferError, match=r"lies on device \(2, 0\), not on \(1, 0\)"):
        buffer.__dlpack__(dl_device=(1, 0))


def test_the_array_interface_has_what_numpy_has(device):
    buffer = device.empty((2, 3), "float16")
    assert buffer[1].__cuda_array_interface__ == {
        "shape": (3,), "typestr": "<f2", "data": (buffer.pointer + 6, False), "strides": None, "stream": None,
        "version": 3,
    }  # fmt: skip
    assert not hasattr(device.empty((2,), "bfloat16"), "__cuda_array_interface__")


def test_the_array_interface_waits_for_what_is_queued(fake, device):
    """Its consumers may not: torch does not."""
    source, buffer = device.empty((2, 3), "float32"), device.empty((2, 3), "float32")
    device.upload(np.ones((2, 3), np.float32), source)
    device.upload(source, buffer)
    address = buffer.__cuda_array_interface__["data"][0]
    seen = np.frombuffer((ctypes.c_byte * buffer.nbytes).from_address(address), np.float32)
    assert (seen == 1).all()


def test_arrays_are_borrowed_while_their_gpu_is_the_current_one(fake):
    """torch lends nothing of another."""
    fake.gpus, found = 2, []

    class Watching(ByDlpack):
        def __dlpack__(self, **wanted):
            found.append(fake.cudaGetDevice()[1])
            return super().__dlpack__(**wanted)

    second = CudaDevice(1)
    second.adopt(Watching(fake, some("float32"), index=1))
    assert (found, fake.cudaGetDevice()[1]) == ([1], 0)


@PRODUCERS
def test_sessions_take_arrays_of_other_libraries_and_leave_theirs_on_the_gpu(onnx_toy, fake, device, producer):
    device.name = "cpu"  # for ONNX Runtime, which computes there
    conditions, noise = {"prompt": make_noise(5, (8,))[None]}, make_noise(1, (6, 8))[None]
    with cachec.load(onnx_toy) as loaded:
        wanted = loaded.session(level="output").run(conditions, noise)
        engines = {name: OrtEngine(engine._native, engine.signature, device) for name, engine in loaded.engines.items()}
        session = Session(engines, loaded.programs["output"], loaded.io)
        given = {name: producer(fake, value) for name, value in conditions.items()}
        result = session.run(given, producer(fake, noise), on_device=True)
        session.run(conditions, -noise)  # a result is the caller's own
        assert device.owns(result)
        np.testing.assert_array_equal(device.download(result), wanted)
        with pytest.raises(InputError, match="'latents' has shape"):
            session.run(given, producer(fake, noise[0]))
        np.testing.assert_array_equal(loaded.session(level="output").run(conditions, noise, on_device=True), wanted)
