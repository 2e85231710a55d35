"""Targets that are built when the bundle is there: what is left when that fails, and on what levels are measured then."""

import shlex
import sys
from types import ModuleType

import pytest
from toy_model import ToyModel
from toy_product import run_cli, succeed

import cachec
from cachec.compiler import late_targets
from cachec.compiler.measuring import measure
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.planning.goals import budget_for_speedup
from cachec.compiler.request import make_request
from cachec.engines import backends, build_apart, ort
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import EngineError, QualityError

WANTED = {"method": "adams", "steps": 4, "schedule": "0,2"}
FLAGS = ["--method", "adams", "--steps", "4", "--schedule", "0,2"]


def needs_rtx():
    return pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")


class TwinEngine(ort.OrtEngine):
    name = "twin"


class TwinBuilder(ort.OrtBuilder):
    apart = True

    def check_build(self, device, precision, options):
        """It builds anywhere, as TensorRT for RTX does."""


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a ring of size {size}" for size in range(24)))
    return path


@pytest.fixture
def twin(monkeypatch):
    """A back end that is built late and runs here: ONNX Runtime by another name, in this process."""
    module = ModuleType("twin_backend")
    module.ENGINE, module.BUILDER = TwinEngine, TwinBuilder(TwinEngine)
    monkeypatch.setitem(sys.modules, "twin_backend", module)
    monkeypatch.setitem(backends.BACKENDS, "twin", "twin_backend")
    monkeypatch.setattr("cachec.engines.add_target.FROM_ONNX", ("twin",))
    monkeypatch.setattr(
        "cachec.engines.build_target.build_apart", lambda builder, *given, **more: builder.build(*given, **more)
    )


def ended(monkeypatch, code="os.kill(os.getpid(), 9)"):
    """Let the process that builds end so."""
    monkeypatch.setattr(build_apart, "_COMMAND", (sys.executable, "-c", f"import os, time; {code}"))


def test_a_killed_build_leaves_a_bundle_that_runs_and_the_command_that_goes_on(tmp_path, toy_directory, monkeypatch):
    needs_rtx()
    out = tmp_path / "out.cachec"
    with monkeypatch.context() as patch:
        ended(patch)
        code, output = run_cli(
            "compile", toy_directory, *FLAGS, "--target", "tensorrt-rtx", "--optimization-level", "1", "-o", out
        )
    assert code == EngineError.exit_code
    assert "was ended by SIGKILL, as the system does when memory is short" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.cachec"]
    with cachec.load(out, verify=True) as bundle:
        assert bundle.target.backend == "ort"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *Bundle.open(out).manifest.files}
    command = shlex.split(output.split("try again with ")[1])
    assert command == ["cachec", "add-target", str(out), "--target", "tensorrt-rtx", "--optimization-level", "1"]
    succeed(*command[1:])
    assert [target.backend for target in Bundle.open(out, verify=True).manifest.targets] == ["ort", "tensorrt-rtx"]


def test_an_interrupted_build_leaves_the_bundle(tmp_path, monkeypatch, caplog):
    needs_rtx()
    monkeypatch.setattr(build_apart, "_hear", lambda child: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(ToyModel(), make_request(ToyModel.spec, **WANTED, targets="tensorrt-rtx"), tmp_path / "out")
    assert f"is whole without tensorrt-rtx: go on with cachec add-target {tmp_path}/out" in caplog.text
    assert [target.backend for target in Bundle.open(tmp_path / "out", verify=True).manifest.targets] == ["ort"]


def test_no_room_is_said_before_anything_is_built(tmp_path, monkeypatch):
    needs_rtx()
    monkeypatch.setattr("cachec.runtime.room.free_memory", lambda: 100e6)
    monkeypatch.setattr("cachec.compiler.pipeline.make_plans", None)
    with pytest.raises(EngineError, match="building for tensorrt-rtx takes 4.* MB of memory, and this machine has 100.00 MB"):
        compile_bundle(ToyModel(), make_request(ToyModel.spec, **WANTED, targets="tensorrt-rtx"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("names", "measured_by"), [(("twin", "eager"), "twin"), (("eager", "twin"), "eager")])
def test_levels_are_measured_on_the_first_target_that_runs_built_late_or_not(tmp_path, twin, prompts, names, measured_by):
    wish = make_request(ToyModel.spec, **WANTED, targets=names, prompts=prompts, min_psnr=1.0)
    manifest = compile_bundle(ToyModel(), wish, tmp_path / "out").bundle.manifest
    assert {target.backend for target in manifest.targets} == {"eager", "ort", "twin"}
    assert manifest.facts["levels"]["default"]["measured_by"] == f"{measured_by} on cpu"
    assert sorted(manifest.files) == sorted(
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*.*")
        if path.name != "manifest.json"
    )


def test_schedules_for_a_speed_are_those_of_the_first_target(tmp_path, twin, prompts, monkeypatch):
    costs = iter((0.2, 0.0))
    monkeypatch.setattr("cachec.compiler.frontend.forecast_cost", lambda *_: next(costs))
    wish = make_request(ToyModel.spec, method="taylor", steps=8, target_speedup=2.0, targets=("twin", "ort"), prompts=prompts)
    bundle = compile_bundle(ToyModel(), wish, tmp_path / "out").bundle
    budgets = [budget_for_speedup(2.0, 8, cost, least=1) for cost in (0.2, 0.0)]
    assert budgets[0] < len(bundle.program().compute_steps) == budgets[1]
    assert len(list((tmp_path / "out" / "programs").iterdir())) == 4


def test_a_level_below_the_gate_on_the_late_engines_is_an_error_and_in_the_bundle(tmp_path, twin, prompts, monkeypatch):
    def worse(*given):
        levels = measure(*given)
        return {level: {**facts, "psnr_db": 0.5} for level, facts in levels.items()}

    monkeypatch.setattr(late_targets, "measure", worse)
    wish = make_request(ToyModel.spec, **WANTED, targets="twin", prompts=prompts, min_psnr=1.0)
    with pytest.raises(QualityError, match="level default reaches 0.50 dB"):
        compile_bundle(ToyModel(), wish, tmp_path / "out")
    assert Bundle.open(tmp_path / "out").manifest.facts["levels"]["default"]["psnr_db"] == 0.5


def test_every_number_of_steps_is_measured_on_the_late_engines(tmp_path, twin, prompts):
    wish = make_request(ToyModel.spec, **{**WANTED, "steps": (4, 3)}, targets="twin", prompts=prompts, min_psnr=1.0)
    manifest = compile_bundle(ToyModel(), wish, tmp_path / "out").bundle.manifest
    assert [one.facts["levels"]["default"]["measured_by"] for one in manifest.variants] == ["twin on cpu"] * 2
    assert Bundle.open(tmp_path / "out", verify=True).at(steps=3).program().num_steps == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]
