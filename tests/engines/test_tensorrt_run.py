"""The run face of TensorRT on fakes of the two vendors' modules: the numbers are real, computed where the addresses point.

``fake_tensorrt`` has the API of 11.0 and no name more; ``fake_cuda`` queues, captures and replays what is given to a stream.
"""

import gc
import importlib.machinery
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from fake_tensorrt import Fake
from toy import example_inputs
from toy_bundle import add_predictor, split_toy, toy_program, write_bundle, write_output_bundle

import cachec
from cachec.compiler.graphs.capture import capture_predictor
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import compose
from cachec.compiler.tables.lower import lower_table, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.engines import cuda_runtime
from cachec.engines.add_target import add_targets
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.tensorrt_from_onnx import PlanFromOnnx
from cachec.engines.tensorrt_library import reports_of
from cachec.engines.tensorrt_run import TensorRTContext, load_native
from cachec.passes import forecast_passes, run_passes
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import MANIFEST, Bundle
from cachec.runtime.errors import BundleError, EngineError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas

STEPS = 50
COMPUTED = (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


@pytest.fixture(scope="module")
def split():
    return split_toy(head_axis=True)


def long_program(split):
    """Taylor of order 1 over 50 steps, 10 of them computed; the graphs are those of any linear method."""
    sigmas = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
    key = ProgramKey(STEPS, hash_sigmas(sigmas), {"height": 6, "width": 8, "text_tokens": 0})
    method, schedule = Taylor(order=1), Schedule(STEPS, COMPUTED)
    with torch.no_grad():
        predictor = capture_predictor(method.predictor(None).eval(), method.window, example_inputs()["latents"], STEPS)
    histories = {step: schedule.history(step, method.window, feeds_back=False) for step in schedule.forecast}
    graphs = run_passes(split, forecast_passes(predictor, torch.from_numpy(sigmas), histories, fold=True))
    table = compose(graphs.rows.coefficients.numpy(), graphs.rows.bias.numpy(), schedule, feeds_back=False)
    return (
        graphs,
        lower_table(table, key, sigmas, sigmas[:-1]),
        lower_uncached(replace(key, level=UNCACHED), sigmas, sigmas[:-1]),
    )


@pytest.fixture(scope="module")
def onnx_bundles(split, tmp_path_factory):
    out, method = tmp_path_factory.mktemp("onnx"), Taylor(order=1)
    graphs = add_predictor(split, method.predictor(None), method.window)
    wide, program, uncached = long_program(split)
    return {
        "hidden": write_bundle(graphs, toy_program(graphs), method, out / "hidden", "ort"),
        "output": write_output_bundle(split, out / "output", "ort"),
        "half": write_bundle(graphs, toy_program(graphs), method, out / "half", "ort", slots=torch.float16),
        "long": write_bundle(wide, program, method, out / "long", "ort", uncached=uncached),
    }


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(memory=1 << 28, driver=13010, capability=(9, 0))
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    return fake


@pytest.fixture
def trt(monkeypatch, cuda):
    fake = Fake(enqueue=cuda.enqueue, is_capturing=cuda.is_capturing)
    install(monkeypatch, fake)
    return fake


def install(monkeypatch, fake):
    """Let ``import tensorrt`` find the fake."""
    fake.module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)


@pytest.fixture
def make_bundle(onnx_bundles, tmp_path, trt):
    def make(name="hidden", max_batch=1, **options):
        path = Path(shutil.copytree(onnx_bundles[name], tmp_path / f"{name}.cachec"))
        add_targets(path, ["tensorrt"], max_batch=max_batch, options=BuildOptions(**options))
        return path

    return make


def request_of(*seeds):
    return (
        {"prompt": np.stack([make_noise(100 + seed, (8,)) for seed in seeds])},
        np.stack([make_noise(seed, (6, 8)) for seed in seeds]),
    )


def expected(path, *requests, level=None):
    """What ONNX Runtime makes of the same files."""
    with cachec.load(path, target="ort", device="cpu") as loaded:
        return [loaded.session(level=level, batch=len(request[1])).run(*request) for request in requests]


def rewrite(path, **changes):
    manifest = replace(Bundle.open(path).manifest, **changes)
    (path / MANIFEST).write_text(json.dumps(manifest.to_json()))


@pytest.mark.parametrize("name", ["hidden", "output", "half"])
@pytest.mark.parametrize("level", [None, UNCACHED])
def test_latents_equal_those_of_onnx_runtime(make_bundle, name, level):
    path = make_bundle(name)
    requests = [request_of(seed) for seed in (1, 2, 1)]
    with cachec.load(path) as loaded:
        assert loaded.target.backend == "tensorrt"
        session = loaded.session(level=level)
        for request, wanted in zip(requests, expected(path, *requests, level=level), strict=True):
            np.testing.assert_array_equal(session.run(*request), wanted)
        assert session.recorded


def test_batches_in_the_range_run(make_bundle):
    path = make_bundle(max_batch=3)
    request = request_of(1, 2)
    with cachec.load(path) as loaded:
        np.testing.assert_array_equal(loaded.session(batch=2).run(*request), expected(path, request)[0])
        with pytest.raises(InputError, match=r"batch is 4; the engines of .* take up to 3: build them with --max-batch 4"):
            loaded.session(batch=4)


def without_copies(cuda):
    """What was called, but for the copies on the GPU that the toy's odd sizes need."""
    return [name for name, *arguments in cuda.log if name != "cudaMemcpyAsync" or arguments[3] != 3]


class TestLongProgram:
    """50 steps, 10 computed: what is called, in which order, on which addresses.

    Slots of four samples are whole multiples of 256 bytes, as those of real models are.
    """

    BATCH = 4

    @pytest.fixture
    def path(self, make_bundle):
        return make_bundle("long", max_batch=self.BATCH)

    def test_three_requests(self, path, trt, cuda):
        requests = [request_of(seed) for seed in (1, 2, 3)]
        wanted = expected(path, *requests)
        with cachec.load(path) as loaded:
            program, session = loaded.programs["default"], loaded.session()
            runs = 1 + len(program.instructions)  # the prologue before them
            assert runs == 1 + 10 + 7
            logs = []
            for request, latents in zip(requests, wanted, strict=True):
                cuda.log.clear()
                trt.calls.clear()
                np.testing.assert_array_equal(session.run(*request), latents)
                logs.append((without_copies(cuda), len(trt.called("IExecutionContext", "execute_async_v3"))))
        first, second, third = logs
        upload, fetch = ["cudaMemcpyAsync", "cudaStreamSynchronize"] * 2, ["cudaMemcpyAsync", "cudaStreamSynchronize"]
        assert first == ([*upload, *["kernel"] * runs, *fetch], runs)
        assert second[1] == runs
        assert [n for n in second[0] if n != "kernel"] == [
            *upload, "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy",
            "cudaGraphLaunch", *fetch,
        ]  # fmt: skip
        assert third == ([*upload, "cudaGraphLaunch", *fetch], 0)

    def test_every_step_is_called_in_order_on_its_own_addresses(self, path, trt):
        with cachec.load(path) as loaded:
            program, session = loaded.programs["default"], loaded.session(batch=self.BATCH)
            trt.calls.clear()
            session.run(*request_of(*range(self.BATCH)))
            bound, seen = {}, []
            for cls, method, values in trt.calls:
                if (cls, method) == ("IExecutionContext", "set_tensor_address"):
                    bound[values[0]] = values[1]
                if (cls, method) == ("IExecutionContext", "execute_async_v3"):
                    seen.append(dict(bound))
            ring = session.slots["feature"]
            slot = ring.nbytes // program.capacity
            for call, instruction in zip(seen[1:], program.instructions, strict=True):
                for number in instruction.writes.values():
                    assert call["feature"] == ring.pointer + number * slot  # straight into its slot
                if not instruction.computes:
                    assert call["features"] == ring.pointer  # the written slots, from the first
                assert call["next_latents"] != call["latents"]
            assert {address % 256 for call in seen for address in call.values()} == {0}

    def test_contexts_keep_their_shapes_and_share_the_scratch_memory(self, path, trt):
        with cachec.load(path) as loaded:
            trt.calls.clear()
            session = loaded.session()
            strategy = trt.module.ExecutionContextAllocationStrategy.USER_MANAGED
            made = trt.called("ICudaEngine", "create_execution_context")
            runs = [len(i.steps) for i in loaded.programs["default"].instructions if not i.computes]
            slots = [i.num_slots for i in loaded.programs["default"].instructions if not i.computes]
            assert made == [(strategy,)] * (1 + 1 + len(set(zip(runs, slots, strict=True))))
            scratch = trt.called("IExecutionContext", "set_device_memory")
            assert len(scratch) == len(made)
            assert len(set(scratch)) == 1
            largest = max(engine._native.engine.device_memory_size_v2 for engine in loaded.engines.values())
            assert 0 < scratch[0][1] <= largest
            trt.calls.clear()
            session.run(*request_of(1))
            assert not trt.called("IExecutionContext", "set_input_shape")

    def test_requests_allocate_nothing(self, path, cuda):
        with cachec.load(path) as loaded:
            session = loaded.session()
            before = len(cuda.blocks)
            cuda.log.clear()
            for seed in (1, 2, 3):
                session.run(*request_of(seed))
            assert not {"cudaMalloc", "cudaFree"} & set(cuda.names())
            assert len(cuda.blocks) == before

    def test_a_session_is_one_piece_of_memory_and_gives_it_back(self, path, cuda):
        with cachec.load(path) as loaded:
            before = len(cuda.blocks), len(cuda.streams)
            sessions = [loaded.session(batch=self.BATCH) for _ in range(3)]
            own = [name for context in sessions[0]._binding._contexts.values() for name, _ in context._own]
            assert [name for name in own if name != "step_values"] == ["feature"]  # the toy's odd rows; what nobody reads
            assert (len(cuda.blocks), len(cuda.streams)) == (before[0] + 3 * (1 + len(own)), before[1] + 3)
            for _ in range(2):
                sessions[0].run(*request_of(*range(self.BATCH)))
            del sessions
            gc.collect()
            assert (len(cuda.blocks), len(cuda.streams)) == before
            assert not cuda.launchable

    def test_interleaved_sessions_equal_sessions_alone(self, path):
        requests = [request_of(seed) for seed in (1, 2)]
        wanted = expected(path, *requests)
        with cachec.load(path) as loaded:
            sessions = [loaded.session() for _ in requests]
            for _ in range(3):
                for session, request in zip(sessions, requests, strict=True):
                    session.begin(*request)
                while not all(session.finished for session in sessions):
                    for session in sessions:
                        session.advance()
                for session, latents in zip(sessions, wanted, strict=True):
                    np.testing.assert_array_equal(session.latents, latents)

    def test_single_calls_are_recorded_when_they_come_again(self, path, cuda):
        request = request_of(1)
        with cachec.load(path) as loaded:
            session, counts = loaded.session(), []
            for _ in range(3):
                cuda.log.clear()
                session.begin(*request)
                while not session.finished:
                    session.advance()
                np.testing.assert_array_equal(session.latents, expected(path, request)[0])
                counts.append([cuda.names().count(n) for n in ("kernel", "cudaGraphInstantiate", "cudaGraphLaunch")])
            runs = len(session._operations) + 1
            assert counts == [[runs, 0, 0], [runs, runs, runs], [0, 0, runs]]

    def test_without_captures_calls_go_on_one_by_one(self, path, cuda, caplog):
        requests = [request_of(seed) for seed in (1, 2, 3)]
        with cachec.load(path) as loaded:
            session = loaded.session()
            session.run(*requests[0])
            cuda.fail("cudaStreamEndCapture", "cudaErrorStreamCaptureUnsupported")
            for request, latents in zip(requests[1:], expected(path, *requests[1:]), strict=True):
                np.testing.assert_array_equal(session.run(*request), latents)
            assert not session.recorded
        assert "the calls of a request are made one by one: they cannot be captured as a CUDA graph" in caplog.text


def open_engine(path, trt, name="advance"):
    target = Bundle.open(path).manifest.targets[-1]
    artifact = target.engines[name]
    return load_native(trt.module, path / artifact.path, artifact.signature), artifact.signature


def arrays(signature, sizes):
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(spec.resolve(sizes), np.float32) for spec in signature.inputs}


def context_of(native, signature, device):
    context = TensorRTContext(native, signature, device)
    context.scratch = device.empty((native.engine.device_memory_size_v2,), "uint8")
    return context


@pytest.mark.parametrize("shift", [0, 4, 128])
def test_odd_addresses_are_copied(make_bundle, trt, shift):
    """Buffers of other libraries may lie anywhere."""
    native, signature = open_engine(make_bundle("output"), trt)
    device = CudaDevice(0, captures=True)
    context = context_of(native, signature, device)
    given = arrays(signature, {"batch": 1, "slots": 3})
    buffers = {}
    for name, value in given.items():
        memory = device.empty((value.nbytes + shift,), "uint8")
        buffers[name] = device.part(memory, shift, value.shape, "float32")
        device.upload(value, buffers[name])
    out = device.part(device.empty((4 * 48 + shift,), "uint8"), shift, (1, 6, 8), "float32")
    call = context.bind(buffers, {"next_latents": out})
    wanted = given["base_share"] * given["base"] + np.tensordot(given["coefficients"][0], given["velocities"], 1)
    for _ in range(3):  # as it is, recorded, replayed
        device.upload(np.zeros((1, 6, 8), np.float32), out)
        call.run()
        np.testing.assert_allclose(device.download(out), wanted, rtol=1e-5, atol=1e-6)


def test_calls_take_the_scratch_memory_of_their_own_shapes(make_bundle, trt):
    """Not that of the largest which the engine takes; and no call is bound without."""
    native, signature = open_engine(make_bundle("output"), trt)
    device = CudaDevice(0, captures=True)
    context = TensorRTContext(native, signature, device)
    few, many = ({spec.name: spec.resolve({"batch": 1, "slots": slots}) for spec in signature.inputs} for slots in (1, 3))
    assert 0 < context.scratch_bytes(few) < context.scratch_bytes(many) < native.engine.device_memory_size_v2
    buffers = {name: device.empty(shape, "float32") for name, shape in many.items()}
    out = {"next_latents": device.empty((1, 6, 8), "float32")}
    wanted = context.scratch_bytes(many)
    with pytest.raises(InputError, match=f"a call needs {wanted} bytes of scratch memory, got 0"):
        context.bind(buffers, out)
    context.scratch = device.empty((wanted - 1,), "uint8")
    with pytest.raises(InputError, match=f"a call needs {wanted} bytes of scratch memory, got {wanted - 1}"):
        context.bind(buffers, out)
    context.scratch = device.empty((wanted,), "uint8")
    context.bind(buffers, out).run()


def test_calls_on_the_same_addresses_share_a_graph(make_bundle, trt, cuda):
    native, signature = open_engine(make_bundle("output"), trt)
    device = CudaDevice(0, captures=True)
    context = context_of(native, signature, device)
    buffers = {name: device.empty(v.shape, "float32") for name, v in arrays(signature, {"batch": 1, "slots": 3}).items()}
    out = [device.empty((1, 6, 8), "float32") for _ in range(2)]
    calls = [context.bind(buffers, {"next_latents": out[index]}) for index in (0, 0, 1)]
    for _ in range(3):
        for call in calls:
            call.run()
    assert cuda.names().count("cudaGraphInstantiate") == 2
    assert cuda.names().count("cudaGraphLaunch") == 6


def test_outputs_that_nobody_wants_have_a_place(make_bundle, trt):
    native, signature = open_engine(make_bundle("output"), trt, "compute")
    device = CudaDevice(0, captures=True)
    context = context_of(native, signature, device)
    buffers = {name: device.empty(v.shape, "float32") for name, v in arrays(signature, {"batch": 1}).items()}
    first, again = (context.bind(buffers, {"velocity": device.empty((1, 6, 8), "float32")}) for _ in range(2))
    first.run()
    again.run()
    assert len({spec.name for spec in signature.outputs}) > 1
    assert len(context._own) == len(signature.outputs) - 1


class TestWeightsApart:
    """Engines without weights, which come from the bundle's one weights file."""

    def test_they_are_loaded_with_the_engines(self, make_bundle, trt):
        path = make_bundle(strip=True)
        target = Bundle.open(path).manifest.targets[-1]
        assert target.weights == {name: a.path for name, a in Bundle.open(path).manifest.targets[0].engines.items()}
        flags = {flag.name for (flag,) in trt.called("IBuilderConfig", "set_flag")}
        assert flags == {"REFIT_IDENTICAL", "STRIP_PLAN"}
        request = request_of(1)
        with cachec.load(path) as loaded:
            np.testing.assert_array_equal(loaded.session().run(*request), expected(path, request)[0])
        assert len(trt.called("Refitter", "refit_cuda_engine")) == len(target.engines)

    def test_without_them_the_bundle_is_refused(self, make_bundle, trt):
        path = make_bundle(strip=True)
        targets = Bundle.open(path).manifest.targets
        rewrite(path, targets=(targets[0], replace(targets[1], weights={})))
        with pytest.raises(BundleError, match="was built without weights, and the bundle names none for it"):
            cachec.load(path)

    def test_other_weights_are_refused(self, make_bundle, onnx_bundles, trt):
        path = make_bundle(strip=True)
        targets = Bundle.open(path).manifest.targets
        wrong = dict.fromkeys(targets[1].weights, targets[0].engines["advance"].path)
        rewrite(path, targets=(targets[0], replace(targets[1], weights=wrong)))
        with pytest.raises(BundleError, match=r"\.plan (does not take the|needs) weights .*advance-.*\.onnx"):
            cachec.load(path)

    @pytest.mark.parametrize("damage", ["altered", "missing"])
    def test_damaged_weights_are_refused_before_anything_is_loaded(self, make_bundle, trt, damage):
        path = make_bundle(strip=True)
        weights = next(path.rglob("weights-*.bin"), None) or next(path.rglob("compute-*.onnx"))
        trt.calls.clear()
        if damage == "missing":
            weights.unlink()
        else:
            weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
        with pytest.raises(BundleError, match="is missing from the bundle|does not match its SHA-256"):
            cachec.load(path)
        assert not trt.called("Runtime", "deserialize_cuda_engine")


class TestRefusedBeforeLoading:
    """What does not fit is never given to TensorRT."""

    @pytest.fixture
    def path(self, make_bundle):
        return make_bundle()

    @pytest.mark.parametrize(
        ("version", "message"),
        [
            ("11.0.1.5", r"it was built with tensorrt 11\.0\.0\.114, here is 11\.0\.1\.5"),
            ("10.16.1.2", r"tensorrt is version 10\.16\.1\.2, but the tensorrt backend is written for 11"),
        ],
    )
    def test_another_version(self, path, monkeypatch, cuda, version, message):
        other = Fake(version=version, enqueue=cuda.enqueue)
        install(monkeypatch, other)
        with pytest.raises((BundleError, InputError), match=message):
            cachec.load(path, target="tensorrt")
        assert not other.calls

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"capability": (8, 9)}, "it was built for sm_90, and Fake GPU is sm_89"),
            ({"driver": 13000}, r"the driver of Fake GPU is for CUDA 13\.0, but tensorrt 11 needs 13\.1"),
            ({"gpus": 0}, "there is no GPU here"),
        ],
        ids=["another GPU", "an old driver", "no GPU"],
    )
    def test_another_machine(self, path, trt, cuda, change, message):
        vars(cuda).update(change)
        trt.calls.clear()
        with pytest.raises((BundleError, InputError), match=message):
            cachec.load(path, target="tensorrt")
        assert not trt.calls

    def test_onnx_runtime_is_used_instead_and_that_is_said(self, path, trt, cuda, caplog):
        cuda.capability = (8, 9)
        request = request_of(1)
        with cachec.load(path) as loaded:
            assert loaded.target.backend == "ort"
            np.testing.assert_array_equal(loaded.session().run(*request), expected(path, request)[0])
        assert "does not fit: it was built for sm_90, and Fake GPU is sm_89" in caplog.text
        assert "using target ort 1." in caplog.text


def test_a_truncated_engine_is_refused(make_bundle, trt):
    path = make_bundle()
    artifact = Bundle.open(path).manifest.targets[-1].engines["compute"]
    plan = path / artifact.path
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(BundleError, match="has .* bytes, the manifest says .*: the copy is incomplete"):
        cachec.load(path)
    with pytest.raises(BundleError, match="compute-.*plan: cannot load this engine: .*add-target --force"):
        load_native(trt.module, plan, artifact.signature)
    plan.write_bytes(b"")
    with pytest.raises(BundleError, match="is empty"):
        load_native(trt.module, plan, artifact.signature)


def test_an_engine_of_another_graph_is_refused(make_bundle, trt):
    target = Bundle.open(path := make_bundle()).manifest.targets[-1]
    with pytest.raises(BundleError, match="has the tensors .* the manifest says .*compile the bundle again"):
        load_native(trt.module, path / target.engines["compute"].path, target.engines["advance"].signature)


@pytest.mark.parametrize(
    ("what", "message"),
    [("load", "no memory to load this engine"), ("context", "no memory to make an execution context")],
)
def test_lack_of_memory_is_said(make_bundle, trt, what, message):
    path = make_bundle()
    trt.no_memory_for = frozenset([what])
    with pytest.raises((BundleError, EngineError), match=message):
        cachec.load(path).session()


def test_no_room_for_a_session_says_how_much_it_takes(make_bundle, cuda):
    path = make_bundle()
    with cachec.load(path) as loaded:
        cuda.memory = sum(block.size for block in cuda.blocks.values()) + 1000
        with pytest.raises(InputError, match=r"cuda:0 has no room for .* MB more \(0.0 MB are free\)"):
            loaded.session()


def test_a_call_that_fails_says_what_tensorrt_said(make_bundle, trt, monkeypatch):
    path = make_bundle()
    with cachec.load(path) as loaded:
        session = loaded.session()
        logger = reports_of(trt.module).logger

        def fail(self, stream):
            trt.log(logger, "Error Code 1: Cask (kernel launch failure)")
            return False

        monkeypatch.setattr(trt.module.IExecutionContext, "execute_async_v3", fail)
        with pytest.raises(EngineError, match=r"cannot run a call: Error Code 1: Cask \(kernel launch failure\)"):
            session.run(*request_of(1))


def refuse(*_):
    raise RuntimeError("an error of C++")


def null(*_):
    raise TypeError("factory function returned nullptr")


@pytest.mark.parametrize(
    ("kind", "method", "instead", "message"),
    [
        ("IExecutionContext", "infer_shapes", refuse, "cannot infer shapes"),
        ("IExecutionContext", "update_device_memory_size_for_shapes", lambda _: 0, "cannot tell how much scratch memory"),
        ("Runtime", "__init__", null, "cannot start tensorrt"),
    ],
)
def test_errors_of_the_library_are_ours(make_bundle, trt, monkeypatch, kind, method, instead, message):
    path = make_bundle()
    monkeypatch.setattr(getattr(trt.module, kind), method, instead)
    with pytest.raises(EngineError, match=message):
        cachec.load(path, target="tensorrt").session()


def test_the_second_gpu_is_the_current_one_in_every_call(onnx_bundles, tmp_path, trt, cuda):
    """TensorRT works on the thread's current GPU, which is the first unless somebody says otherwise."""
    cuda.gpus = 2
    path = Path(shutil.copytree(onnx_bundles["hidden"], tmp_path / "toy.cachec"))
    seen = set()

    def note(method, real):
        def noting(self, *arguments):
            seen.add((method, cuda.cudaGetDevice()[1]))
            return real(self, *arguments)

        return noting

    checked = {
        "Builder": ("create_network", "build_serialized_network"),
        "IBuilderConfig": ("create_timing_cache", "set_timing_cache"),
        "Runtime": ("deserialize_cuda_engine",),
        "ICudaEngine": ("create_execution_context",),
        "IExecutionContext": ("set_input_shape", "execute_async_v3"),
    }
    for name, methods in checked.items():
        for method in methods:
            kind = getattr(trt.module, name)
            setattr(kind, method, note(method, getattr(kind, method)))
    add_targets(path, ["tensorrt"], device="cuda:1")
    request = request_of(1)
    with cachec.load(path, device="cuda:1", target="tensorrt") as loaded:
        np.testing.assert_array_equal(loaded.session().run(*request), expected(path, request)[0])
    assert seen == {(method, 1) for methods in checked.values() for method in methods}
    assert cuda.cudaGetDevice()[1] == 0


class TestBuildOptions:
    """What the builder is asked for."""

    def values(self, trt, name):
        return [value for (value,) in trt.called("IBuilderConfig", f"{name}=")]

    def test_defaults(self, make_bundle, trt):
        make_bundle()
        assert set(self.values(trt, "builder_optimization_level")) == {3}
        assert not trt.called("IBuilderConfig", "set_flag")
        assert {flag.name for (flag,) in trt.called("IBuilderConfig", "clear_flag")} == {"TF32"}
        assert not trt.called("IBuilderConfig", "set_memory_pool_limit")
        assert not self.values(trt, "hardware_compatibility_level")
        assert self.values(trt, "max_aux_streams") == [0, 0, 0]  # of all but the compute engine

    def test_level_and_workspace(self, make_bundle, trt):
        make_bundle(level=5, workspace=1_500_000_000)
        assert set(self.values(trt, "builder_optimization_level")) == {5}
        pool = trt.module.MemoryPoolType.WORKSPACE
        assert set(trt.called("IBuilderConfig", "set_memory_pool_limit")) == {(pool, 1_500_000_000)}

    def test_hardware_compatibility_is_warned_about_and_widens_the_target(self, make_bundle, trt, cuda, caplog):
        path = make_bundle(compatibility="ampere-plus")
        assert {level.name for level in self.values(trt, "hardware_compatibility_level")} == {"AMPERE_PLUS"}
        assert "hardware compatibility ampere-plus costs some speed" in caplog.text
        cuda.capability = (8, 6)
        trt.sm = (8, 6)
        with cachec.load(path) as loaded:
            assert loaded.target.backend == "tensorrt"

    def test_version_compatible_engines_may_bring_host_code_and_others_may_not(self, make_bundle, trt, monkeypatch, cuda):
        path = make_bundle(version_compatible=True)
        assert {flag.name for (flag,) in trt.called("IBuilderConfig", "set_flag")} == {"VERSION_COMPATIBLE"}
        cachec.load(path).close()
        assert trt.called("Runtime", "engine_host_code_allowed=") == [(True,)] * 4
        newer = Fake(version="11.1.0.7", enqueue=cuda.enqueue)
        install(monkeypatch, newer)
        cachec.load(path).close()
        assert len(newer.called("Runtime", "deserialize_cuda_engine")) == 4

    def test_engines_of_one_version_never_bring_host_code(self, make_bundle, trt):
        cachec.load(make_bundle()).close()
        assert not trt.called("Runtime", "engine_host_code_allowed=")

    def test_names_of_files_say_where_they_run(self, make_bundle):
        paths = [a.path for a in Bundle.open(make_bundle()).manifest.targets[-1].engines.values()]
        assert all(Path(path).name.split("-", 1)[1].startswith("11.0.0.114_sm90-float32-6x8-") for path in paths)

    def test_no_memory_to_build(self, onnx_bundles, tmp_path, trt):
        path = Path(shutil.copytree(onnx_bundles["hidden"], tmp_path / "toy.cachec"))
        before = Bundle.open(path).manifest
        trt.no_memory_for = frozenset(["build"])
        with pytest.raises(EngineError, match="there is no memory to build the .* engine: .* workspace"):
            add_targets(path, ["tensorrt"])
        assert Bundle.open(path, verify=True).manifest.targets == before.targets

    def test_sizes_that_the_library_refuses(self, make_bundle, trt, monkeypatch):
        monkeypatch.setattr(trt.module.IOptimizationProfile, "set_shape", refuse)
        with pytest.raises(EngineError, match="cannot set the sizes that the .* engine takes"):
            make_bundle()

    def test_without_a_driver_the_builder_says_so(self, trt):
        trt.no_driver = True
        with pytest.raises(EngineError, match="start TensorRT's builder, which needs a GPU and its driver"):
            PlanFromOnnx(trt.module, BuildOptions()).prepare("compute", Path("no.onnx"), None)

    def test_a_node_that_the_parser_does_not_know(self, onnx_bundles, tmp_path, trt):
        path = Path(shutil.copytree(onnx_bundles["hidden"], tmp_path / "toy.cachec"))
        trt.unsupported = frozenset(["LayerNormalization"])
        with pytest.raises(EngineError, match=r"TensorRT's parser rejects .*\.onnx: node \d+ '.*' \(LayerNormalization\)"):
            add_targets(path, ["tensorrt"])


class TestTimings:
    """Kernel timings stay in the bundle and make the next build quicker."""

    def test_they_are_kept_and_used_again(self, make_bundle, trt):
        path = make_bundle()
        manifest = Bundle.open(path, verify=True).manifest
        (key,) = manifest.timing
        assert key == "tensorrt-11.0.0.114_sm90"
        content = (path / manifest.timing[key]).read_bytes()
        trt.calls.clear()
        add_targets(path, ["tensorrt"], force=True, options=BuildOptions(level=4))
        assert bytes(trt.called("IBuilderConfig", "create_timing_cache")[0][0]) == content

    def test_they_are_kept_when_a_build_is_interrupted(self, onnx_bundles, tmp_path, trt, monkeypatch):
        path = Path(shutil.copytree(onnx_bundles["hidden"], tmp_path / "toy.cachec"))
        before, real, built = Bundle.open(path).manifest, PlanFromOnnx._run, []

        def interrupt(self, draft, name):
            if built:
                raise KeyboardInterrupt
            built.append(name)
            return real(self, draft, name)

        monkeypatch.setattr(PlanFromOnnx, "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_targets(path, ["tensorrt"])
        after = Bundle.open(path, verify=True).manifest
        assert after.targets == before.targets
        assert after.timing.keys() == {"tensorrt-11.0.0.114_sm90"}
        on_disk = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {MANIFEST}
        assert on_disk == set(after.files)
        assert not list(path.parent.glob(".*"))

    def test_those_of_another_gpu_are_not_used(self, make_bundle, trt, caplog, tmp_path):
        timing = tmp_path / "odd.timing"
        timing.write_bytes(b"of another GPU")
        builder = PlanFromOnnx(trt.module, BuildOptions(), timing)
        config = trt.module.Builder(trt.module.Logger()).create_builder_config()
        with builder._timings(config):
            pass
        assert timing.read_bytes() != b"of another GPU"


def test_running_takes_no_torch(make_bundle, trt, tmp_path):
    """As on a machine that only serves: numpy, TensorRT and CUDA. Only the fakes need onnx and ONNX Runtime."""
    path = make_bundle()
    request = request_of(1)
    np.savez(tmp_path / "request.npz", prompt=request[0]["prompt"], noise=request[1], wanted=expected(path, request)[0])
    code = (
        "import sys, importlib.machinery, numpy as np\n"
        "for name in ('torch', 'diffusers', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from fake_cuda import FakeCuda\n"
        "from fake_tensorrt import Fake\n"
        "from cachec.engines import cuda_runtime\n"
        "cuda = FakeCuda(memory=1 << 28, driver=13010)\n"
        "cuda_runtime.runtime = lambda: cuda\n"
        "fake = Fake(enqueue=cuda.enqueue, is_capturing=cuda.is_capturing)\n"
        "fake.module.__spec__ = importlib.machinery.ModuleSpec('tensorrt', None)\n"
        "sys.modules['tensorrt'] = fake.module\n"
        "import cachec\n"
        "given = np.load(sys.argv[2])\n"
        "with cachec.load(sys.argv[1]) as loaded:\n"
        "    assert loaded.target.backend == 'tensorrt'\n"
        "    got = loaded.session().run({'prompt': given['prompt']}, given['noise'])\n"
        "np.testing.assert_array_equal(got, given['wanted'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "request.npz")], check=True, timeout=120)
