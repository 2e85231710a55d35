"""Real engines: TensorRT for RTX builds without a GPU, with the code that TensorRT is built with."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest
from toy_bundle import SCHEDULE, STEPS

from cachec.engines.tensorrt_from_onnx import PlanFromOnnx, make_monitor
from cachec.engines.tensorrt_library import TENSORRT_RTX
from cachec.engines.tensorrt_rtx import BUILDER
from cachec.runtime.abi import BATCH, COMPUTE, FORECASTS, SLOTS, steps_of
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import EngineError
from cachec.runtime.sizes import size_ranges

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
SIZES = size_ranges(STEPS, 4, max_batch=3)


@pytest.fixture(scope="module")
def drafts(onnx_toy):
    """What the builder is given for each engine: its signature, and the network with its options."""
    plan = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=SIZES), flags=TENSORRT_RTX.flags)
    engines = Bundle.open(onnx_toy).manifest.targets[0].engines
    return {name: (a.signature, plan.prepare(name, onnx_toy / a.path, a.signature)) for name, a in engines.items()}


def test_networks_take_and_give_what_signatures_say(drafts):
    for name, (signature, draft) in drafts.items():
        network = draft.network
        for side, specs in (("input", signature.inputs), ("output", signature.outputs)):
            tensors = [getattr(network, f"get_{side}")(i) for i in range(getattr(network, f"num_{side}s"))]
            found = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in tensors}
            wanted = {s.name: [size if isinstance(size, int) else -1 for size in s.shape] for s in specs}
            assert found == {key: (rtx.DataType.FLOAT, shape) for key, shape in wanted.items()}, name


def test_profiles_are_the_ranges_of_the_symbolic_sizes(drafts):
    seen = set()
    for signature, draft in drafts.values():
        for spec in signature.inputs:
            shapes = draft.profile.get_shape(spec.name) if any(isinstance(size, str) for size in spec.shape) else ()
            for index, size in enumerate(spec.shape if shapes else ()):
                if isinstance(size, str):
                    known = SIZES[size]
                    assert [shape[index] for shape in shapes] == [known.least, known.usual, known.most]
                    seen.add(size)
    assert {BATCH, SLOTS, FORECASTS, steps_of(COMPUTE)} <= seen
    assert (SIZES[SLOTS].most, SIZES[SLOTS].usual) == (STEPS, len(SCHEDULE.compute))


def test_float32_means_float32_and_calls_may_be_captured_and_take_memory_for_their_own_shapes(drafts):
    for _, draft in drafts.values():
        assert not draft.config.get_flag(rtx.BuilderFlag.TF32)
        assert draft.config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
        assert draft.config.get_preview_feature(rtx.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10)


def test_another_signature_is_noticed(drafts, onnx_toy):
    engines = Bundle.open(onnx_toy).manifest.targets[0].engines
    plan = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=SIZES))
    with pytest.raises(EngineError, match="as TensorRT reads it, takes .*latents of rank 3.*expected .*base"):
        plan.prepare("compute", onnx_toy / engines["compute"].path, engines["advance"].signature)


def test_what_the_parser_rejects_is_named_with_its_reason(tmp_path):
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], name="strange")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy")
    path = tmp_path / "compute.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), path)
    with pytest.raises(EngineError, match=r"parser rejects compute.onnx: node 0 'strange' \(NoSuchOperator\): "):
        PlanFromOnnx(TENSORRT_RTX.load(), DEFAULTS).prepare("compute", path, None)
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(EngineError, match="parser rejects compute.onnx"):
        PlanFromOnnx(TENSORRT_RTX.load(), DEFAULTS).prepare("compute", path, None)


def test_a_cancelled_build_gives_nothing(drafts):
    draft, cancelled = drafts["advance"][1], threading.Event()
    cancelled.set()
    draft.config.progress_monitor = make_monitor(rtx, "advance", cancelled)
    assert draft.builder.build_serialized_network(draft.network, draft.config) is None


def test_engines_name_the_gpus_that_they_are_for_and_take_few_options():
    assert BUILDER.needs(DeviceName("cuda"), DEFAULTS) == {"sm": [80, 86, 89, 120], "cuda": "13.0"}
    assert BUILDER.options == {"level", "workspace"}
    BUILDER.check_build(DeviceName("cuda"), "bfloat16", DEFAULTS)  # without a GPU


INTERRUPTED = """
import os, signal
import os, signal, sys
from cachec.engines import tensorrt_from_onnx
make = tensorrt_from_onnx.make_monitor

def interrupting(library, name, cancelled):
    monitor = make(library, name, cancelled)
    real = monitor.step_complete

    def step_complete(phase, step):
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled.wait(60)
        return real(phase, step)

    monitor.step_complete = step_complete
    return monitor

tensorrt_from_onnx.make_monitor = interrupting
from cachec.cli import start
sys.argv = ["cachec", "add-target", sys.argv[1], "--target", "tensorrt-rtx"]
start()
"""


def test_an_interrupted_command_leaves_the_bundle_alone(bundle):
    """Ctrl-C in the middle of a real build, as the shell sends it: when the builder's first step is done."""
    before = Bundle.open(bundle).manifest
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(bundle)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert Bundle.open(bundle, verify=True).manifest == before
    assert not list(bundle.parent.glob(".*"))


BUILD = """
import sys
for name in ("torch", "onnx", "onnx_ir", "diffusers", "transformers"):
    sys.modules[name] = None
from pathlib import Path
from cachec.engines.add_target import add_targets
add_targets(Path(sys.argv[1]), ["tensorrt-rtx"])
"""


def test_building_takes_neither_torch_nor_onnx(bundle):
    """As on a machine that only deploys."""
    subprocess.run([sys.executable, "-c", BUILD, str(bundle)], check=True, timeout=120)
    target = Bundle.open(bundle, verify=True).manifest.targets[-1]
    for name, artifact in target.engines.items():
        file = Path(artifact.path).name
        assert re.fullmatch(rf"{name}-{rtx.__version__}(_sm\d+)+-float32-8x6-[0-9a-f]{{16}}\.plan", file)
        assert (bundle / artifact.path).stat().st_size > 10_000
