"""``cachec add-target``: what it refuses, and that a bundle stays whole whatever happens. TensorRT is the fake one."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from engine_toys import rewrite

from cachec.cli import main
from cachec.engines.add_target import add_targets
from cachec.engines.tensorrt_from_onnx import PlanFromOnnx
from cachec.pictures.components import Part
from cachec.runtime import write
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import MANIFEST, Bundle
from cachec.runtime.components import Component, components_of
from cachec.runtime.device import CUDA, DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import BundleError, EngineError, InputError, OutputError
from cachec.runtime.variants import Variant
from cachec.runtime.work import holding

pytestmark = pytest.mark.usefixtures("trt")


def files_of(bundle):
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - {MANIFEST}


def test_the_command_adds_engines_and_lists_them(bundle):
    before = Bundle.open(bundle).manifest
    result = CliRunner().invoke(main, ["add-target", str(bundle), "--target", "tensorrt", "--max-batch", "2"])
    assert result.exit_code == 0, result.output
    assert "tensorrt 11.0.0.114, linux, cuda sm_90, float32" in result.output
    after = Bundle.open(bundle, verify=True).manifest
    assert after.targets[:-1] == before.targets
    assert after.targets[-1].sizes["batch"] == [1, 2, 2]
    for name, artifact in after.targets[-1].engines.items():
        assert artifact.signature == before.targets[0].engines[name].signature
        assert Path(artifact.path).name.startswith(f"{name}-11.0.0.114_sm90-float32-8x6-")
    assert files_of(bundle) == set(after.files)
    assert not list(bundle.parent.glob(".*"))


def test_a_target_is_not_replaced_unasked(bundle):
    add_targets(bundle, ["tensorrt"])
    before = Bundle.open(bundle).manifest
    with pytest.raises(OutputError, match="has tensorrt .* already: pass --force"):
        add_targets(bundle, ["tensorrt"])
    assert Bundle.open(bundle).manifest == before
    add_targets(bundle, ["tensorrt"], force=True, max_batch=2)
    after = Bundle.open(bundle, verify=True).manifest
    assert len(after.targets) == len(before.targets)
    assert files_of(bundle) == set(after.files)


def test_bundles_without_onnx_files_cannot_be_added_to(bundle):
    (target,) = Bundle.open(bundle).manifest.targets
    rewrite(bundle, targets=(type(target)(**{**vars(target), "backend": "eager"}),))
    with pytest.raises(BundleError, match="has no ONNX files to build from, only eager .*: compile it again with --target ort"):
        add_targets(bundle, ["tensorrt"])


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["tensort"], {}, "unknown target 'tensort'. Did you mean 'tensorrt'"),
        (["auto", "tensorrt"], {}, "target auto takes the fastest of all: leave tensorrt out"),
        (["aoti"], {}, "target aoti is not built from the ONNX files in a bundle"),
        (["tensorrt-cpu"], {}, "runs on cuda only"),
        (["ort-tensorrt"], {"options": BuildOptions(strip=True)}, "stripped weights is for none of the targets ort-tensorrt"),
        (["tensorrt"], {"max_batch": 0}, "max-batch is 0"),
        (["tensorrt"], {"device": "cpu"}, "device is cpu, but what add-target builds runs on NVIDIA GPUs only"),
        (["tensorrt", "tensorrt-cuda"], {}, "is asked for twice: name it once"),
    ],
)
def test_impossible_wishes_leave_the_bundle_alone(bundle, names, options, message):
    before = Bundle.open(bundle).manifest
    with pytest.raises(InputError, match=message):
        add_targets(bundle, names, **options)
    assert Bundle.open(bundle, verify=True).manifest == before


def test_a_damaged_bundle_is_not_left_locked(bundle):
    content = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(b"{}")
    with pytest.raises(BundleError, match="is not the manifest of a cachec bundle"):
        add_targets(bundle, ["tensorrt"])
    (bundle / MANIFEST).write_bytes(content)
    add_targets(bundle, ["tensorrt"])


def test_what_another_process_added_meanwhile_stays(bundle, monkeypatch):
    """The bundle is read when the lock is had, not before."""
    other = shutil.copytree(bundle, bundle.with_name("other.cachec"))
    add_targets(other, ["tensorrt"])
    added = Bundle.open(other).manifest

    @contextmanager
    def late(path, busy, *, wait=False):
        shutil.copytree(other, bundle, dirs_exist_ok=True)
        with holding(path, busy, wait=wait):
            yield

    monkeypatch.setattr(write, "holding", late)
    with pytest.raises(OutputError, match="already: pass --force"):
        add_targets(bundle, ["tensorrt"])
    assert Bundle.open(bundle, verify=True).manifest == added


def test_a_bundle_that_is_replaced_meanwhile_is_left_alone(bundle, monkeypatch):
    other = shutil.copytree(bundle, bundle.with_name("other.cachec"))
    rewrite(other, noise="of another kind")

    def replaced(self, *given, real=PlanFromOnnx.build):
        shutil.copytree(other, bundle, dirs_exist_ok=True)
        real(self, *given)

    monkeypatch.setattr(PlanFromOnnx, "build", replaced)
    with pytest.raises(OutputError, match="was replaced meanwhile"):
        add_targets(bundle, ["tensorrt"])
    assert Bundle.open(bundle, verify=True).manifest == Bundle.open(other).manifest


def test_files_of_a_killed_build_go_with_the_next(bundle):
    lost = bundle / "engines" / "tensorrt-float32" / "compute-lost.plan"
    lost.parent.mkdir()
    lost.write_bytes(b"half of it")
    add_targets(bundle, ["tensorrt"])
    assert not lost.exists()


def failing_at_second(error):
    built = []

    def build(self, draft, name, real=PlanFromOnnx._run):
        if built:
            raise error
        built.append(name)
        return real(self, draft, name)

    return build


@pytest.mark.parametrize("error", [EngineError("there is no memory to build it"), KeyboardInterrupt()])
def test_a_build_that_ends_early_adds_its_timings_only(bundle, monkeypatch, error):
    before = Bundle.open(bundle).manifest
    monkeypatch.setattr(PlanFromOnnx, "_run", failing_at_second(error))
    with pytest.raises(type(error)):
        add_targets(bundle, ["tensorrt"])
    after = Bundle.open(bundle, verify=True).manifest
    assert after.targets == before.targets
    assert after.timing.keys() == {"tensorrt-11.0.0.114_sm90"}
    assert files_of(bundle) == set(after.files)
    assert not list(bundle.parent.glob(".*"))


def test_timings_are_kept_and_used_again(bundle, trt):
    add_targets(bundle, ["tensorrt"])
    (name,) = Bundle.open(bundle, verify=True).manifest.timing.values()
    content = (bundle / name).read_bytes()
    trt.calls.clear()
    add_targets(bundle, ["tensorrt"], force=True, options=BuildOptions(level=4))
    assert bytes(trt.called("IBuilderConfig", "create_timing_cache")[0][0]) == content


@pytest.mark.parametrize("fastest", ["tensorrt", "ort"])
def test_the_fastest_is_added_unless_the_onnx_files_are(bundle, monkeypatch, fastest):
    """ONNX Runtime has no CUDA here, so that how fast either is, is told."""
    before = Bundle.open(bundle).manifest
    monkeypatch.setattr(
        "cachec.engines.build_target.build_apart", lambda builder, *given, **more: builder.build(*given, **more)
    )
    monkeypatch.setattr("cachec.engines.ort.check_provider", lambda *given: None)

    def ratio(best, new):
        new.seconds = {"compute": 1.0}
        return 1.0 if best is None else 0.5 if fastest == str(new.name) else 2.0

    monkeypatch.setattr("cachec.engines.fastest._compare", ratio)
    result = CliRunner().invoke(main, ["add-target", str(bundle), "--target", "auto"])
    assert result.exit_code == 0, result.output
    assert f"on cuda:0: {fastest} is kept" in result.output
    after = Bundle.open(bundle, verify=True).manifest
    assert [target.backend for target in after.targets] == ["ort", *(["tensorrt"] if fastest == "tensorrt" else [])]
    assert after.facts["auto"]["targets"].keys() == {"ort", "tensorrt"}
    assert after.facts["auto"]["failed"].keys() == {"ort-tensorrt", "tensorrt-rtx"}
    assert files_of(bundle) == set(after.files) >= set(before.files)


def test_engines_are_built_for_every_size(bundle):
    manifest = Bundle.open(bundle).manifest
    wide = replace(manifest.targets[0], shape_bucket="9x6")
    other = Variant({**manifest.settings, "width": 9}, manifest.programs, {})
    rewrite(bundle, targets=(*manifest.targets, wide), more=(other,))
    _, added = add_targets(bundle, ["tensorrt"])
    assert [target.shape_bucket for target in added] == ["8x6", "9x6"]
    after = Bundle.open(bundle, verify=True).manifest
    assert [(target.backend, *target.picture_sizes) for target in after.targets] == [
        ("ort", "8x6"), ("ort", "9x6"), ("tensorrt", "8x6"), ("tensorrt", "9x6"),
    ]  # fmt: skip
    assert Path(after.targets[-1].engines["compute"].path).name.startswith("compute-11.0.0.114_sm90-float32-9x6-")
    assert files_of(bundle) == set(after.files)


def test_components_are_built_too_and_run(bundle):
    target = Bundle.open(bundle).target
    artifact = target.engines["advance"]
    fixed = replace(artifact, signature=artifact.signature.at({"batch": 1, "slots": 2}))
    part = Component((replace(target, engines={"8x6": fixed}, shape_bucket="any"),), {"8x6": {"weights": 0, "activations": 0}})
    rewrite(bundle, components={"decoder": part.to_json()})
    add_targets(bundle, ["tensorrt"])
    opened = Bundle.open(bundle, verify=True)
    built = components_of(opened.manifest)["decoder"].targets
    assert [one.backend for one in built] == ["ort", "tensorrt"]
    assert built[1].engines["8x6"].path.startswith("components/decoder/tensorrt-float32/8x6-11.0.0.114_sm90-float32-any-")
    assert files_of(bundle) == set(opened.manifest.files)
    given = {spec.name: np.full(spec.resolve({}), 0.5, spec.dtype) for spec in fixed.signature.inputs}
    on_host, on_gpu = (Part("decoder", opened, device, None).run("8x6", given) for device in (HOST, DeviceName(CUDA)))
    np.testing.assert_allclose(on_gpu["next_latents"], on_host["next_latents"], rtol=1e-6)
    add_targets(bundle, ["tensorrt"], force=True, options=BuildOptions(level=1))
    after = Bundle.open(bundle, verify=True)
    assert len(components_of(after.manifest)["decoder"].targets) == 2
    assert files_of(bundle) == set(after.manifest.files)
