"""tiny-flux to real TensorRT-RTX engines, from the command line."""

import pytest
from click.testing import CliRunner

from cachec.cli import main
from cachec.engines.tensorrt_from_onnx import PlanFromOnnx
from cachec.engines.tensorrt_library import TENSORRT_RTX
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.sizes import size_ranges

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
ENGINES = {"prologue": 5e6, "compute": 10e6, "forecast": 3e5, "advance": 1e5}  # bytes, at least
pytestmark = pytest.mark.slow
TYPES = {"float32": rtx.DataType.FLOAT, "float16": rtx.DataType.HALF, "bfloat16": rtx.DataType.BF16}


def check_networks(out, target, dtype):
    """Names, types, shapes and profiles of all that goes in and out, as the builder has them."""
    sizes = size_ranges(50, 10)
    builder, slots = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=sizes)), set()
    for name, artifact in target.engines.items():
        draft = builder.prepare(name, out / artifact.path, artifact.signature)
        network = draft.network
        tensors = {t.name: t for t in map(network.get_input, range(network.num_inputs))}
        tensors |= {t.name: t for t in map(network.get_output, range(network.num_outputs))}
        specs = {spec.name: spec for spec in (*artifact.signature.inputs, *artifact.signature.outputs)}
        assert tensors.keys() == specs.keys()
        for key, spec in specs.items():
            assert tensors[key].dtype == TYPES[spec.dtype], key
            fixed = [size if isinstance(size, int) else 1 if size == "batch" else -1 for size in spec.shape]
            assert list(tensors[key].shape) == fixed, key
            if key in ("feature", "features"):
                slots.add(spec.dtype)
        for spec in artifact.signature.inputs:
            if -1 in list(tensors[spec.name].shape):
                ranges = draft.profile.get_shape(spec.name)
                for which, shape in zip(("least", "usual", "most"), ranges, strict=True):
                    wanted = [getattr(sizes[size], which) if isinstance(size, str) else size for size in spec.shape]
                    assert list(shape) == wanted, (spec.name, which)
    assert slots == {dtype}


def test_compile_builds_engines_and_inspect_shows_them(tmp_path, caplog):
    dtype, out = "bfloat16", tmp_path / "tiny-flux.cachec"
    wanted = ["compile", "tiny-flux", "--method", "lesa", "--target", "tensorrt-rtx", "--dtype", dtype, "-o", str(out)]
    result = CliRunner().invoke(main, wanted)
    assert result.exit_code == 0, result.output
    assert "nothing of this bundle runs on this machine" in caplog.text
    bundle = Bundle.open(out, verify=True)
    onnx, engines = bundle.manifest.targets
    assert (engines.backend, engines.version, engines.precision) == ("tensorrt-rtx", rtx.__version__, dtype)
    assert (onnx.backend, onnx.precision) == ("ort", dtype)
    check_networks(out, onnx, dtype)
    for name, least in ENGINES.items():
        plan = bundle.path(engines.engines[name].path)
        assert plan.stat().st_size > least
        assert f"-{dtype}-128x128-" in plan.name
    shown = CliRunner().invoke(main, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    assert f"tensorrt-rtx {rtx.__version__}, " in shown.output
    assert engines.engines["compute"].path in shown.output
    assert "sizes batch 1 to 1, slots 1 to 50, forecasts 1 to 49" in shown.output
    assert "does not fit here: " in shown.output
