"""The bench of engines and precision: a real build of a small model, its row in the report, and errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

cases = pytest.importorskip("bench.cases", reason="the source tree is not beside the tests")
engines = pytest.importorskip("bench.engines", reason="the source tree is not beside the tests")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines")
    cases.write_weights(path / "weights", {**cases.SMALL_CONFIG, "num_layers": 0, "num_single_layers": 2})
    return path


@pytest.mark.slow
def test_engines_are_built_and_reported(work):
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
    root = engines.compile_case(cases.SHAPED, "float16", work, quick=True)
    run, onnx = engines.build_engines(root), engines.onnx_bytes(root)
    assert set(run["bytes"]) == set(engines.ENGINES)
    assert sum(run["bytes"].values()) > onnx > run["bytes"]["compute"] / 3
    errors = {"float16": {"pass": {"velocity": np.array([0.01, 0.02, 0.06]), "latents": np.array([0.5])}}}
    build = {"case": cases.SHAPED, "dtype": "float16", "onnx": onnx, "runs": [{**run, "seconds": s} for s in (3.0, 1.0, 9.0)]}
    page = engines.report([build], errors, 1, "python -m bench.engines --quick")
    sizes = " | ".join(f"{run['bytes'][name] / 1e6:.1f}" for name in engines.ENGINES)
    assert f"| flux-shaped | float16 | {sizes} | 3.0 (1.0–9.0) |" in page
    assert "| float16 | `cast_precision` | 2.000 % (1.000–6.000) | 50.000 % (50.000–50.000) |" in page


def test_a_failed_build_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="nothing here"):
        engines.build_engines(tmp_path / "nothing here")


def test_the_pass_costs_less_than_the_whole_cast(work):
    case = cases.open_case(cases.SHAPED, work, quick=True)
    case = replace(case, settings=replace(case.settings, steps=3))
    errors = engines.measure_errors(case, torch.bfloat16, ["a", "b"])
    for kind in ("velocity", "latents"):
        assert len(errors["pass"][kind]) == 2  # one step, two prompts
        assert (errors["pass"][kind] > 0).all()
        assert (errors["pass"][kind] < errors["whole"][kind]).all()
