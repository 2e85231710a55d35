"""Real engines: TensorRT for RTX builds without a GPU, with the code that TensorRT is built with."""

import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from toy_bundle import SCHEDULE, STEPS, add_predictor, split_toy, toy_program, write_bundle, write_output_bundle

from cachec.cli import main
from cachec.compiler.methods.taylor import Taylor
from cachec.engines import get_builder
from cachec.engines.add_target import add_targets
from cachec.engines.tensorrt_from_onnx import PlanFromOnnx, make_monitor
from cachec.engines.tensorrt_library import TENSORRT_RTX, Reports
from cachec.runtime import write
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, EngineError, InputError, OutputError
from cachec.runtime.sizes import size_ranges
from cachec.runtime.work import holding

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
SIZES = size_ranges(STEPS, 4)


@pytest.fixture(scope="module")
def split():
    return split_toy(head_axis=True)


@pytest.fixture(scope="module")
def ort_bundles(split, tmp_path_factory):
    """ONNX bundles on both cuts."""
    out, method = tmp_path_factory.mktemp("onnx"), Taylor(order=1)
    graphs = add_predictor(split, method.predictor(None), method.window)
    return {
        "hidden": write_bundle(graphs, toy_program(graphs), method, out / "hidden", "ort"),
        "output": write_output_bundle(split, out / "output", "ort"),
    }


@pytest.fixture
def bundle(ort_bundles, tmp_path):
    return Path(shutil.copytree(ort_bundles["hidden"], tmp_path / "toy.cachec"))


def drafts(bundle, **options):
    builder = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=SIZES, **options))
    target = Bundle.open(bundle).manifest.targets[0]
    for name, artifact in target.engines.items():
        yield name, artifact.signature, builder.prepare(name, Path(bundle) / artifact.path, artifact.signature)


@pytest.mark.parametrize("cut", ["hidden", "output"])
def test_networks_take_and_give_what_signatures_say(ort_bundles, cut):
    for name, signature, draft in drafts(ort_bundles[cut]):
        network = draft.network
        for side, specs in (("input", signature.inputs), ("output", signature.outputs)):
            tensors = [getattr(network, f"get_{side}")(i) for i in range(getattr(network, f"num_{side}s"))]
            assert {t.name for t in tensors} == {spec.name for spec in specs}
            for tensor in tensors:
                spec = next(spec for spec in specs if spec.name == tensor.name)
                assert tensor.dtype == {"float32": rtx.DataType.FLOAT, "float16": rtx.DataType.HALF}[spec.dtype]
                wanted = [size if isinstance(size, int) else 1 if size == "batch" else -1 for size in spec.shape]
                assert list(tensor.shape) == wanted, (name, spec)


def test_profiles_are_the_ranges_of_the_symbolic_sizes(ort_bundles):
    seen = set()
    for _, signature, draft in drafts(ort_bundles["hidden"]):
        for spec in signature.inputs:
            symbols = [size for size in spec.shape if isinstance(size, str) and size != "batch"]
            if not symbols:
                continue
            least, usual, most = draft.profile.get_shape(spec.name)
            for index, size in enumerate(spec.shape):
                if isinstance(size, str):
                    known = SIZES[size]
                    assert (least[index], usual[index], most[index]) == (known.least, known.usual, known.most)
                    seen.add(size)
    assert {"slots", "forecasts", "compute_steps", "forecast_steps"} <= seen
    assert SIZES["slots"].most == STEPS
    assert SIZES["slots"].usual == len(SCHEDULE.compute)


def test_a_range_of_batches_stays_symbolic(ort_bundles, tmp_path):
    bundle = Bundle.open(ort_bundles["output"]).manifest.targets[0].engines["compute"]
    builder = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=size_ranges(STEPS, 4, max_batch=3)))
    draft = builder.prepare("compute", ort_bundles["output"] / bundle.path, bundle.signature)
    assert [s[0] for s in draft.profile.get_shape("latents")] == [1, 3, 3]


def test_calls_may_be_captured_and_take_memory_for_their_own_shapes(ort_bundles):
    builder = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=SIZES), flags=TENSORRT_RTX.flags)
    artifact = Bundle.open(ort_bundles["hidden"]).manifest.targets[0].engines["forecast"]
    config = builder.prepare("forecast", ort_bundles["hidden"] / artifact.path, artifact.signature).config
    assert config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_preview_feature(rtx.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10)


def test_float32_means_float32(ort_bundles):
    for _, _, draft in drafts(ort_bundles["hidden"]):
        assert not draft.config.get_flag(rtx.BuilderFlag.TF32)


def test_engines_are_added_to_a_bundle_and_listed(bundle):
    before = Bundle.open(bundle).manifest
    result = CliRunner().invoke(main, ["add-target", str(bundle), "--target", "tensorrt-rtx"])
    assert result.exit_code == 0, result.output
    after = Bundle.open(bundle, verify=True).manifest
    assert after.targets[:-1] == before.targets
    target = after.targets[-1]
    assert target.engines.keys() == before.targets[0].engines.keys()
    for name, artifact in target.engines.items():
        assert artifact.signature == before.targets[0].engines[name].signature
        file = Path(artifact.path).name
        assert re.fullmatch(rf"{name}-{rtx.__version__}(_sm\d+)+-float32-6x8-[0-9a-f]{{16}}\.plan", file)
        assert (bundle / artifact.path).stat().st_size > 10_000
    assert f"tensorrt-rtx {rtx.__version__}" in result.output
    assert not list(bundle.parent.glob(".*"))


def test_a_target_is_not_replaced_unasked(bundle):
    add_targets(bundle, ["tensorrt-rtx"])
    before = Bundle.open(bundle).manifest
    with pytest.raises(OutputError, match="has tensorrt-rtx .* already: pass --force"):
        add_targets(bundle, ["tensorrt-rtx"])
    assert Bundle.open(bundle).manifest == before
    add_targets(bundle, ["tensorrt-rtx"], force=True, max_batch=2)
    after = Bundle.open(bundle, verify=True).manifest
    assert len(after.targets) == len(before.targets)
    assert after.targets[-1].sizes["batch"] == [1, 2, 2]
    on_disk = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - {"manifest.json"}
    assert on_disk == set(after.files)


def test_what_the_parser_rejects_is_named_with_its_reason(tmp_path):
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], name="strange")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy")
    path = tmp_path / "compute.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), path)
    with pytest.raises(EngineError, match=r"parser rejects compute.onnx: node 0 'strange' \(NoSuchOperator\): "):
        PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions()).prepare("compute", path, None)


def test_a_file_that_is_no_onnx_is_refused(tmp_path, ort_bundles):
    path = tmp_path / "compute.onnx"
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(EngineError, match="parser rejects compute.onnx"):
        PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions()).prepare("compute", path, None)


def test_another_signature_is_noticed(ort_bundles):
    engines = Bundle.open(ort_bundles["output"]).manifest.targets[0].engines
    builder = PlanFromOnnx(TENSORRT_RTX.load(), BuildOptions(sizes=SIZES))
    with pytest.raises(EngineError, match="as TensorRT reads it, takes .*latents of rank 3.*expected .*noise"):
        builder.prepare("compute", ort_bundles["output"] / engines["compute"].path, engines["advance"].signature)


def test_bundles_without_onnx_files_cannot_be_added_to(split, tmp_path):
    eager = write_output_bundle(split, tmp_path / "eager.cachec")
    with pytest.raises(BundleError, match="has no ONNX files to build from, only eager .*: compile it again with --target ort"):
        add_targets(eager, ["tensorrt-rtx"])


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["tensort"], {}, "unknown target 'tensort'. Did you mean 'tensorrt'"),
        (["aoti"], {}, "target aoti is not built from the ONNX files in a bundle"),
        (["torch-tensorrt"], {}, "target torch-tensorrt is not built from the ONNX files in a bundle"),
        (["tensorrt-rtx-cpu"], {}, "runs on cuda only"),
        (["tensorrt-rtx"], {"options": BuildOptions(strip=True)}, "stripped weights is for none of the targets tensorrt-rtx"),
        (["tensorrt-rtx"], {"max_batch": 0}, "max-batch is 0"),
        (["tensorrt-rtx"], {"device": "cpu"}, "device is cpu, but what add-target builds runs on NVIDIA GPUs only"),
        (["tensorrt-rtx", "tensorrt-rtx-cuda"], {}, "is asked for twice: name it once"),
    ],
)
def test_impossible_wishes_leave_the_bundle_alone(bundle, names, options, message):
    before = Bundle.open(bundle).manifest
    with pytest.raises(InputError, match=message):
        add_targets(bundle, names, **options)
    assert Bundle.open(bundle, verify=True).manifest == before


HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from cachec.runtime.write import BundleAdder\n"
    "with BundleAdder(Path(sys.argv[1])):\n"
    "    print(flush=True)\n"
    "    time.sleep(60)\n"
)


def test_only_one_process_adds_to_a_bundle(bundle, monkeypatch):
    """However its path is written; a process that is killed blocks nobody."""
    link = bundle.with_name("link.cachec")
    link.symlink_to(bundle)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(bundle)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        monkeypatch.chdir(bundle)
        for path in (bundle, link, Path()):
            with pytest.raises(OutputError, match="another process is adding a target to .*: wait until it is done"):
                add_targets(path, ["tensorrt-rtx"])
        holder.kill()
    add_targets(link, ["tensorrt-rtx"])
    assert len(Bundle.open(bundle, verify=True).manifest.targets) == 2
    assert not list(bundle.glob(".*"))


def test_a_damaged_bundle_is_not_left_locked(bundle):
    manifest = bundle / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    with pytest.raises(BundleError, match="is not the manifest of a cachec bundle"):
        add_targets(bundle, ["tensorrt-rtx"])
    manifest.write_bytes(content)
    add_targets(bundle, ["tensorrt-rtx"])
    assert len(Bundle.open(bundle).manifest.targets) == 2


def test_what_another_process_added_meanwhile_stays(bundle, monkeypatch):
    """The bundle is read when the lock is had, not before."""
    other = shutil.copytree(bundle, bundle.with_name("other.cachec"))
    add_targets(other, ["tensorrt-rtx"])
    added = Bundle.open(other).manifest

    @contextmanager
    def late(path, busy, *, wait=False):
        shutil.copytree(other, bundle, dirs_exist_ok=True)
        with holding(path, busy, wait=wait):
            yield

    monkeypatch.setattr(write, "holding", late)
    with pytest.raises(OutputError, match="already: pass --force"):
        add_targets(bundle, ["tensorrt-rtx"])
    assert Bundle.open(bundle, verify=True).manifest == added


def test_a_bundle_that_is_replaced_meanwhile_is_left_alone(bundle, ort_bundles, monkeypatch):
    def replaced(self, name, *rest, real=PlanFromOnnx.build):
        shutil.rmtree(bundle / "programs")
        shutil.copytree(ort_bundles["output"], bundle, dirs_exist_ok=True)
        monkeypatch.undo()
        real(self, name, *rest)

    monkeypatch.setattr(PlanFromOnnx, "build", replaced)
    with pytest.raises(OutputError, match="was replaced meanwhile"):
        add_targets(bundle, ["tensorrt-rtx"])
    assert Bundle.open(bundle, verify=True).manifest == Bundle.open(ort_bundles["output"]).manifest


def test_files_of_a_killed_build_go_with_the_next(bundle):
    lost = bundle / "engines" / "tensorrt-rtx-float32" / "compute-lost.plan"
    lost.parent.mkdir()
    lost.write_bytes(b"half of it")
    add_targets(bundle, ["tensorrt-rtx"])
    assert not lost.exists()


@pytest.mark.parametrize("given", [{"strip": True}, {"version_compatible": True, "compatibility": "ampere-plus"}])
def test_options_of_other_targets_are_not_applied(given):
    options = BuildOptions(level=5, **given)
    assert options.only(get_builder("tensorrt-rtx").options) == BuildOptions(level=5)
    assert options.only(get_builder("ort").options) == BuildOptions()
    assert options.only(get_builder("tensorrt").options) == options


def test_a_build_that_fails_leaves_the_bundle_alone(bundle, monkeypatch):
    before = Bundle.open(bundle).manifest
    built = []

    def fail_at_second(self, name, *rest, real=PlanFromOnnx.build):
        if built:
            raise EngineError("there is no memory to build it")
        built.append(name)
        real(self, name, *rest)

    monkeypatch.setattr(PlanFromOnnx, "build", fail_at_second)
    with pytest.raises(EngineError, match="no memory"):
        add_targets(bundle, ["tensorrt-rtx"])
    assert Bundle.open(bundle, verify=True).manifest == before
    on_disk = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - {"manifest.json"}
    assert on_disk == set(before.files)


def test_a_cancelled_build_gives_nothing(ort_bundles):
    _, _, draft = next(iter(drafts(ort_bundles["hidden"])))
    cancelled = threading.Event()
    cancelled.set()
    draft.config.progress_monitor = make_monitor(rtx, "compute", cancelled)
    assert draft.builder.build_serialized_network(draft.network, draft.config) is None


def test_an_interrupted_command_leaves_the_bundle_alone(bundle):
    """Ctrl-C in the middle of a real build: the builder has begun a phase and does not end it before it hears of it."""
    before = Bundle.open(bundle).manifest
    code = (
        "import signal, threading, sys\n"
        "from cachec.engines import tensorrt_from_onnx as b\n"
        "real = b.make_monitor\n"
        "def interrupting(library, name, cancelled):\n"
        "    class Interrupting(type(real(library, name, cancelled))):\n"
        "        def phase_start(self, *arguments):\n"
        "            super().phase_start(*arguments)\n"
        "            if not cancelled.is_set():\n"
        "                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)\n"
        "                cancelled.wait()\n"
        "    return Interrupting()\n"
        "b.make_monitor = interrupting\n"
        "from cachec.cli import start\n"
        "sys.argv = ['cachec', 'add-target', sys.argv[1], '--target', 'tensorrt-rtx']\n"
        "start()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert Bundle.open(bundle, verify=True).manifest == before
    assert not list(bundle.parent.glob(".*"))


def test_errors_about_memory_say_what_to_do():
    reports = Reports(rtx)
    reports.logger.log(rtx.ILogger.ERROR, "Error Code 2: OutOfMemory\n (Requested size was 99 bytes)")
    error = reports.error("build the compute engine")
    assert "no memory to build the compute engine: Error Code 2: OutOfMemory (Requested size was 99 bytes)" in str(error)
    assert "a workspace limits" in str(error)
    reports.logger.log(rtx.ILogger.INTERNAL_ERROR, "something else")
    assert str(reports.error("build it")) == "cannot build it: something else"
    assert str(reports.error("build it")) == "cannot build it: the library does not say why"


def test_building_takes_neither_torch_nor_onnx(bundle):
    """As on a machine that only deploys."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'diffusers', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from cachec.engines.add_target import add_targets\n"
        "add_targets(__import__('pathlib').Path(sys.argv[1]), ['tensorrt-rtx'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, timeout=120)
    assert len(Bundle.open(bundle).manifest.targets) == 2
