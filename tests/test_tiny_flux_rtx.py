"""tiny-flux to real TensorRT-RTX engines, from the command line."""

import pytest
from click.testing import CliRunner

import cachec
from cachec.cli import main
from cachec.runtime.bundle import Bundle

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
ENGINES = {"prologue": 5e6, "compute": 10e6, "forecast": 3e5, "advance": 1e5}  # bytes, at least


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compile_builds_engines_and_inspect_shows_them(tmp_path, dtype):
    out = tmp_path / "tiny-flux.cachec"
    wanted = ["compile", "tiny-flux", "--method", "lesa", "--target", "tensorrt-rtx", "--dtype", dtype, "-o", str(out)]
    result = CliRunner().invoke(main, wanted)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(out, verify=True)
    engines, onnx = bundle.manifest.targets
    assert (engines.backend, engines.version, engines.precision) == ("tensorrt-rtx", rtx.__version__, dtype)
    assert (onnx.backend, onnx.precision) == ("ort", dtype)
    for name, least in ENGINES.items():
        plan = bundle.path(engines.engines[name].path)
        assert plan.stat().st_size > least
        assert f"-{dtype}-64x64-" in plan.name
    shown = CliRunner().invoke(main, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    assert f"tensorrt-rtx {rtx.__version__}, " in shown.output
    assert engines.engines["compute"].path in shown.output
    assert "sizes batch 1 to 1, slots 1 to 50, forecasts 1 to 49" in shown.output
    assert "does not fit here: " in shown.output
    if dtype == "float32":  # the same files run on the CPU
        assert "fits here, on cpu" in shown.output
        with cachec.load(out) as loaded:
            assert loaded.target.backend == "ort"
