"""Running TensorRT on fakes of the two vendors' modules: the numbers are real, computed where the addresses point.

``fake_tensorrt`` has the API of 11.0 and no name more; ``fake_cuda`` queues, captures and replays what is given to a stream.
"""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_toys import rewrite

import cachec
from cachec.engines.add_target import add_targets
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.tensorrt_library import reports_of
from cachec.engines.tensorrt_run import TensorRTContext, load_native
from cachec.runtime.abi import FEATURE, STEP_VALUES, VELOCITIES, VELOCITY
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, EngineError, InputError
from cachec.runtime.lane_policy import Policy
from cachec.runtime.lanes import Lanes
from cachec.runtime.program import UNCACHED
from cachec.runtime.variants import Variant, name_shapes

BATCH_SIZE = 4  # slots of four samples are whole multiples of 256 bytes, as those of real models are


@pytest.fixture(scope="module")
def built(onnx_toy, tmp_path_factory):
    """A bundle with engines for up to four samples, for tests that leave it as it is; and the fakes that they were built on."""
    import shutil

    from engine_toys import install
    from fake_cuda import FakeCuda
    from fake_tensorrt import Fake

    from cachec.engines import cuda_runtime

    path = Path(shutil.copytree(onnx_toy, tmp_path_factory.mktemp("tensorrt") / "toy.cachec"))
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeCuda(memory=1 << 28, driver=13010, capability=(9, 0))
        patch.setattr(cuda_runtime, "runtime", lambda: fake)
        install(patch, Fake(enqueue=fake.enqueue, is_capturing=fake.is_capturing))
        add_targets(path, ["tensorrt"], max_batch=BATCH_SIZE)
    return path


@pytest.fixture
def path(built, trt):
    return built


@pytest.fixture
def make_bundle(bundle, trt):
    def make(max_batch=1, **options):
        add_targets(bundle, ["tensorrt"], max_batch=max_batch, options=BuildOptions(**options))
        return bundle

    return make


def expected(path, *requests, level=None):
    """What ONNX Runtime makes of the same files."""
    with cachec.load(path, target="ort", device="cpu") as loaded:
        return [loaded.session(level=level, batch=len(request[1])).run(*request) for request in requests]


@pytest.mark.parametrize("level", [None, "output", UNCACHED])
def test_latents_equal_those_of_onnx_runtime(path, request_of, level):
    requests = [request_of(seed) for seed in (1, 2, 1)]
    with cachec.load(path) as loaded:
        assert loaded.target.backend == "tensorrt"
        session = loaded.session(level=level)
        for request, wanted in zip(requests, expected(path, *requests, level=level), strict=True):
            np.testing.assert_array_equal(session.run(*request), wanted)
        assert session.recorded


def test_batches_in_the_range_run(path, request_of):
    request = request_of(1, 2)
    with cachec.load(path) as loaded:
        np.testing.assert_array_equal(loaded.session(batch=2).run(*request), expected(path, request)[0])
        with pytest.raises(InputError, match=r"batch is 5; the engines of .* take up to 4: build them with --max-batch 5"):
            loaded.session(batch=5)


def without_copies(cuda):
    """What was called, but for the copies on the GPU that the toy's odd sizes need."""
    return [name for name, *arguments in cuda.log if name != "cudaMemcpyAsync" or arguments[3] != 3]


def test_what_three_requests_call(path, trt, cuda, request_of):
    requests = [request_of(seed) for seed in (1, 2, 3)]
    wanted = expected(path, *requests)
    with cachec.load(path) as loaded:
        program, session = loaded.programs["default"], loaded.session()
        runs = 1 + len(program.instructions)  # the prologue before them
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


def test_every_step_is_called_in_order_on_its_own_addresses(path, trt, request_of):
    with cachec.load(path) as loaded:
        program, session = loaded.programs["default"], loaded.session(batch=BATCH_SIZE)
        trt.calls.clear()
        session.run(*request_of(*range(BATCH_SIZE)))
        bound, seen = {}, []
        for cls, method, values in trt.calls:
            if (cls, method) == ("IExecutionContext", "set_tensor_address"):
                bound[values[0]] = values[1]
            if (cls, method) == ("IExecutionContext", "execute_async_v3"):
                seen.append(dict(bound))
        ring = session.slots["feature"]
        slot = ring.nbytes // program.capacity
        for call, instruction in zip(seen[1:], program.instructions, strict=True):
            for (number,) in instruction.writes.values():
                assert call["feature"] == ring.pointer + number * slot  # straight into its slot
            if not instruction.computes:
                assert call["features"] == ring.pointer  # the written slots, from the first
            assert call["next_latents"] != call["latents"]
        assert {address % 256 for call in seen for address in call.values()} == {0}


def test_contexts_keep_their_shapes_and_share_the_scratch_memory(path, trt, request_of):
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


def test_requests_allocate_nothing(path, cuda, request_of):
    with cachec.load(path) as loaded:
        session = loaded.session()
        before = len(cuda.blocks)
        cuda.log.clear()
        for seed in (1, 2, 3):
            session.run(*request_of(seed))
        assert not {"cudaMalloc", "cudaFree"} & set(cuda.names())
        assert len(cuda.blocks) == before


def test_a_session_is_one_piece_of_memory_and_gives_it_back(path, cuda, request_of):
    with cachec.load(path) as loaded:
        before = len(cuda.blocks), len(cuda.streams)
        sessions = [loaded.session(batch=BATCH_SIZE) for _ in range(3)]
        own = [name for context in sessions[0]._binding._contexts.values() for name, _ in context._own]
        assert set(own) <= {STEP_VALUES, FEATURE, VELOCITY, VELOCITIES}  # the toy's odd rows; what nobody reads
        assert (len(cuda.blocks), len(cuda.streams)) == (before[0] + 3 * (1 + len(own)), before[1] + 3)
        for _ in range(2):
            sessions[0].run(*request_of(*range(BATCH_SIZE)))
        del sessions
        gc.collect()
        assert (len(cuda.blocks), len(cuda.streams)) == before
        assert not cuda.launchable


def test_interleaved_sessions_equal_sessions_alone(path, request_of):
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


def test_lanes_replay_their_batches_and_allocate_nothing(path, cuda, request_of):
    requests, levels = [request_of(seed) for seed in range(5)], (None, "output", UNCACHED)
    with cachec.load(path) as loaded:
        lanes, before = Lanes(loaded, lanes=3, policy=Policy("fifo", BATCH_SIZE)), len(cuda.blocks)
        cuda.log.clear()
        tickets = [lanes.submit(conditions, noise=noise, level=levels[seed % 3])
                   for seed, (conditions, noise) in enumerate(requests)]  # fmt: skip
        lanes.run_until_idle()
        assert {"cudaMemcpyAsync", "cudaGraphLaunch"} <= set(cuda.names())
        assert not {"kernel", "cudaMalloc", "cudaFree", "cudaGraphInstantiate"} & set(cuda.names())
        assert len(cuda.blocks) == before
    for seed, ticket in enumerate(tickets):
        np.testing.assert_array_equal(ticket.result(0), expected(path, requests[seed], level=levels[seed % 3])[0])


def test_lanes_on_a_gpu_that_vanishes_fail_every_request_in_words_and_go_on(path, cuda, request_of):
    requests = [request_of(seed) for seed in range(3)]
    with cachec.load(path) as loaded:
        lanes = Lanes(loaded, lanes=2, policy=Policy("fifo", BATCH_SIZE))

        def submit():
            return [lanes.submit(conditions, noise=noise) for conditions, noise in requests]

        on_their_way = submit()
        lanes.tick()  # two of them
        cuda.gone = True
        tickets = on_their_way + submit()
        lanes.run_until_idle()
        for ticket in tickets:
            with pytest.raises(EngineError, match=rf"request {ticket.number}: CUDA: .* fails with cudaErrorNoDevice \(100\)"):
                ticket.result(0)
        cuda.gone = False
        tickets = submit()
        lanes.run_until_idle()
    for ticket, request in zip(tickets, requests, strict=True):
        np.testing.assert_array_equal(ticket.result(0), expected(path, request)[0])


def test_single_calls_are_recorded_when_they_come_again(path, cuda, request_of):
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
        runs = sum(map(len, session._instructions)) + 1
        assert counts == [[runs, 0, 0], [runs, runs, runs], [0, 0, runs]]


def test_without_captures_calls_go_on_one_by_one(path, cuda, caplog, request_of):
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
def test_odd_addresses_are_copied(path, trt, shift):
    """Buffers of other libraries may lie anywhere."""
    native, signature = open_engine(path, trt)
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


def test_calls_take_the_scratch_memory_of_their_own_shapes(path, trt):
    """Not that of the largest which the engine takes; and no call is bound without."""
    native, signature = open_engine(path, trt)
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


def test_calls_on_the_same_addresses_share_a_graph(path, trt, cuda):
    native, signature = open_engine(path, trt)
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


def test_outputs_that_nobody_wants_have_a_place(path, trt):
    native, signature = open_engine(path, trt, "compute")
    device = CudaDevice(0, captures=True)
    context = context_of(native, signature, device)
    buffers = {name: device.empty(v.shape, "float32") for name, v in arrays(signature, {"batch": 1}).items()}
    first, again = (context.bind(buffers, {"velocity": device.empty((1, 6, 8), "float32")}) for _ in range(2))
    first.run()
    again.run()
    assert len({spec.name for spec in signature.outputs}) > 1
    assert len(context._own) == len(signature.outputs) - 1


def test_weights_apart_are_loaded_with_the_engines(make_bundle, trt, request_of):
    path = make_bundle(strip=True)
    target = Bundle.open(path).manifest.targets[-1]
    assert target.weights == {name: a.path for name, a in Bundle.open(path).manifest.targets[0].engines.items()}
    flags = {flag.name for (flag,) in trt.called("IBuilderConfig", "set_flag")}
    assert flags == {"REFIT_IDENTICAL", "STRIP_PLAN"}
    request = request_of(1)
    with cachec.load(path) as loaded:
        np.testing.assert_array_equal(loaded.session().run(*request), expected(path, request)[0])
    assert len(trt.called("Refitter", "refit_cuda_engine")) == len(target.engines)


def test_without_its_weights_the_bundle_is_refused(make_bundle):
    path = make_bundle(strip=True)
    targets = Bundle.open(path).manifest.targets
    rewrite(path, targets=(targets[0], replace(targets[1], weights={})))
    with pytest.raises(BundleError, match="was built without weights, and the bundle names none for it"):
        cachec.load(path)


def test_other_weights_are_refused(make_bundle):
    path = make_bundle(strip=True)
    targets = Bundle.open(path).manifest.targets
    wrong = dict.fromkeys(targets[1].weights, targets[0].engines["advance"].path)
    rewrite(path, targets=(targets[0], replace(targets[1], weights=wrong)))
    with pytest.raises(BundleError, match=r"\.plan (does not take the|needs) weights .*advance-.*\.onnx"):
        cachec.load(path)


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damaged_weights_are_refused_before_anything_is_loaded(make_bundle, trt, damage):
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


def test_an_engine_of_another_graph_is_refused(path, trt):
    target = Bundle.open(path).manifest.targets[-1]
    with pytest.raises(BundleError, match="has the tensors .* the manifest says .*compile the bundle again"):
        load_native(trt.module, path / target.engines["compute"].path, target.engines["advance"].signature)


@pytest.mark.parametrize(
    ("what", "message"),
    [("load", "no memory to load this engine"), ("context", "no memory to make an execution context")],
)
def test_lack_of_memory_is_said(path, trt, what, message):
    trt.no_memory_for = frozenset([what])
    with pytest.raises((BundleError, EngineError), match=message):
        cachec.load(path).session()


def test_no_room_for_a_session_says_how_much_it_takes(path, cuda):
    with cachec.load(path) as loaded:
        cuda.memory = sum(block.size for block in cuda.blocks.values()) + 1000
        with pytest.raises(InputError, match=r"cuda:0 has no room for .* MB more \(0.0 MB are free\)"):
            loaded.session()


def test_a_call_that_fails_says_what_tensorrt_said(path, trt, monkeypatch, request_of):
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
def test_errors_of_the_library_are_ours(path, trt, monkeypatch, kind, method, instead, message):
    monkeypatch.setattr(getattr(trt.module, kind), method, instead)
    with pytest.raises(EngineError, match=message):
        cachec.load(path, target="tensorrt").session()


def test_the_second_gpu_is_the_current_one_in_every_call(bundle, trt, cuda, request_of):
    """TensorRT works on the thread's current GPU, which is the first unless somebody says otherwise."""
    cuda.gpus = 2
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
    add_targets(bundle, ["tensorrt"], device="cuda:1")
    request = request_of(1)
    with cachec.load(bundle, device="cuda:1", target="tensorrt") as loaded:
        np.testing.assert_array_equal(loaded.session().run(*request), expected(bundle, request)[0])
    assert seen == {(method, 1) for methods in checked.values() for method in methods}
    assert cuda.cudaGetDevice()[1] == 0


def test_running_takes_no_torch(path, tmp_path, request_of):
    """As on a machine that only serves: numpy, TensorRT and CUDA. Only the fakes need onnx and ONNX Runtime."""
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


def with_further_weights(path):
    """The bundle with an ONNX file for compute whose weights are twice as large, as ``cachec add-weights`` would add one."""
    import onnx

    from cachec.runtime.write import BundleAdder

    with BundleAdder(path) as writer:
        manifest = writer.bundle.manifest
        (target,) = manifest.targets
        name = target.engines["compute"].path
        model = onnx.load(path / name)
        for weights in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weights)
            if values.dtype == np.float32 and values.ndim == 2:
                weights.CopyFrom(onnx.numpy_helper.from_array(2 * values, weights.name))
        folder = writer.directory(str(Path(name).parent))
        onnx.save(model, folder / "compute-twice.onnx")
        other = writer.seal(folder / "compute-twice.onnx")
        known = {"weights_sha256": "b" * 64, "file": other, "loras": [], "samples": {}}
        new = replace(manifest, targets=(replace(target, added={"twice": {"compute": other}}),), weights={"twice": known})
        writer.commit(replace(new, files=writer.files))
    return path


def test_refittable_engines_take_the_bundles_further_weights(bundle, trt, request_of):
    add_targets(with_further_weights(bundle), ["tensorrt"], options=BuildOptions(refit=True))
    assert {flag.name for (flag,) in trt.called("IBuilderConfig", "set_flag")} == {"REFIT"}
    request, found = request_of(1), {}
    for target in ("ort", "tensorrt"):
        for weights in (None, "twice"):
            with cachec.load(bundle, target=target, weights=weights) as loaded:
                found[target, weights] = loaded.session().run(*request)
    for weights in (None, "twice"):
        np.testing.assert_allclose(found["tensorrt", weights], found["ort", weights], rtol=1e-5)
    assert np.abs(found["ort", "twice"] - found["ort", None]).max() > 1e-3
    assert len(trt.called("Refitter", "refit_cuda_engine")) == 1  # of the one graph that they change


def test_engines_that_keep_their_weights_say_how_to_build_others(bundle, trt):
    add_targets(with_further_weights(bundle), ["tensorrt"], options=BuildOptions(strip=True))
    with pytest.raises(
        InputError, match="tensorrt .* has not the weights twice: .* with cachec add-target --refittable --force"
    ):
        cachec.load(bundle, target="tensorrt", weights="twice")
    assert cachec.load(bundle, weights="twice").target.backend == "ort"
    with pytest.raises(InputError, match=r"unknown weights 'thrice'. Did you mean 'twice'\? Known: twice"):
        cachec.load(bundle, weights="thrice")


def test_a_bundle_without_further_weights_says_what_adds_some(bundle):
    with pytest.raises(InputError, match="has no further weights, so none called 'x': cachec add-weights adds some"):
        cachec.load(bundle, weights="x")


def test_of_files_for_all_sizes_an_engine_is_built_for_each(bundle, trt, request_of):
    """The sizes of the toy differ in what is the batch elsewhere."""
    manifest = Bundle.open(bundle).manifest
    (text,) = manifest.texts
    both = replace(manifest.targets[0], shape_bucket=name_shapes(["8x6", "9x6"], [text]))
    other = Variant({**manifest.settings, "width": 9}, manifest.programs, {})
    names = [name_shapes([size], [text]) for size in ("8x6", "9x6")]
    shapes = dict(zip(names, ({"axes": {"batch": 1}}, {"axes": {"batch": 2}}), strict=True))
    rewrite(bundle, targets=(both,), more=(other,), shapes=shapes)
    _, added = add_targets(bundle, ["tensorrt"], max_batch=2)
    assert [target.shape_bucket for target in added] == names
    with cachec.load(bundle) as loaded, cachec.load(bundle, target="ort", device="cpu") as ort:
        for size, seeds in (("8x6", (1,)), ("9x6", (1, 2))):
            made, wanted = (one.session(batch=len(seeds), size=size).run(*request_of(*seeds)) for one in (loaded, ort))
            np.testing.assert_array_equal(made, wanted)
