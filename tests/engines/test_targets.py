"""Which target of a bundle is taken, and what is said of the others."""

import importlib.util
import platform
from dataclasses import replace

import pytest

from cachec.engines import get_builder
from cachec.engines.backends import BACKENDS
from cachec.engines.gpu import Gpu
from cachec.engines.targets import ONNX_TARGET, TargetName, choose_target, find_fit
from cachec.engines.tensorrt import TensorRTEngine
from cachec.engines.tensorrt_library import Library
from cachec.runtime.build_options import DEFAULTS
from cachec.runtime.bundle import ANY_DEVICE, Artifact, Target
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import BundleError, InputError, MissingExtraError
from cachec.runtime.specs import Signature, TensorSpec

OS = platform.system().lower()
CPU, GPU = DeviceName("cpu"), DeviceName("cuda")
H200 = Gpu("NVIDIA H200", 90, 140 * 10**9, 150 * 10**9, (13, 1))


def target(backend, device, precision="float32", version="11.0.0.114", **needs):
    return Target(backend, version, OS, device, precision, "64x64, 16 text tokens", {}, needs)


ORT = target("ort", ANY_DEVICE, version="1.31.1")
SM90 = target("tensorrt", "cuda", sm=[90])
SM89 = target("tensorrt", "cuda", sm=[89])


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with an H200 and TensorRT 11, as far as questions go that load no engine."""
    gpus = [H200]

    def find(device):
        if device.index >= len(gpus):
            raise InputError(f"device is {device}, but there are {len(gpus)} GPUs, counted from 0")
        return gpus[device.index]

    monkeypatch.setattr("cachec.engines.tensorrt.find_gpu", find)
    monkeypatch.setattr(Library, "load", lambda self: None)
    monkeypatch.setattr(Library, "module_name", lambda self: "tensorrt")
    monkeypatch.setattr(Library, "version", lambda self: "11.0.0.114")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    return gpus


def test_the_engine_for_this_gpu_is_taken(with_gpu):
    fit, others = choose_target([ORT, SM89, SM90])
    assert (fit.target, fit.device, fit.backend) == (SM90, GPU, TensorRTEngine)
    assert [(other.target, other.reason) for other in others] == [(SM89, "it was built for sm_89, and NVIDIA H200 is sm_90")]


def test_the_lean_runtime_runs_what_is_version_compatible_and_has_its_weights(with_gpu, monkeypatch):
    monkeypatch.setattr(Library, "module_name", lambda self: "tensorrt_lean")
    assert find_fit(target("tensorrt", "cuda", sm=[90], version_from="11.0.0.114")).fits
    for needs in ({}, {"version_from": "11.0.0.114", "stripped": True}):
        assert find_fit(target("tensorrt", "cuda", sm=[90], **needs)).reason.startswith(
            "tensorrt_lean runs only engines that are"
        )
    with pytest.raises(InputError, match="tensorrt_lean runs engines, but has no builder"):
        get_builder("tensorrt").check_build(GPU, "float32", DEFAULTS)


def test_slots_in_bfloat16_do_not_run_on_onnx_runtime_on_the_cpu():
    spec = TensorSpec("feature", ("batch", 4), "bfloat16")
    engines = {"compute": Artifact("compute.onnx", Signature((), (spec,)))}
    assert "bfloat16 is what ONNX Runtime has no kernels for" in find_fit(replace(ORT, engines=engines), CPU).reason


def test_the_order_of_targets_does_not_matter(with_gpu):
    for order in ([SM90, ORT], [ORT, SM90]):
        assert choose_target(order)[0].target == SM90


def test_of_two_that_fit_the_one_for_this_gpu_is_taken(with_gpu):
    other, mine = (target("tensorrt", "cuda", sm=[90], gpu=name) for name in ("NVIDIA H100 PCIe", H200.name))
    for order in ([other, mine], [mine, other]):
        assert choose_target(order)[0].target == mine
    (fit, *_), same = choose_target([other]), "; a request gets the same in batches of any size, "
    assert fit.in_words == "fits here, on cuda:0, but was not tuned for just this GPU: add-target makes one that is"
    assert (fit.batches_in_words, find_fit(ORT, CPU).batches_in_words) == (f"{same}to rounding", f"{same}bit for bit")


def test_onnx_runtime_is_taken_where_no_engine_fits(with_gpu):
    fit, others = choose_target([SM89, ORT])
    assert (fit.target, fit.device) == (ORT, CPU)
    assert [other.target for other in others] == [SM89]
    assert others[0].rank < fit.rank


def test_on_the_cpu_tensorrt_is_never_taken(with_gpu):
    fit, others = choose_target([SM90, ORT], device=CPU)
    assert fit.target == ORT
    assert others[0].reason == "device is cpu, but it was built for cuda"


def test_a_target_can_be_asked_for_by_name(with_gpu):
    assert choose_target([SM90, ORT], wanted=TargetName("ort"))[0].target == ORT
    with pytest.raises(BundleError, match=r"it has no target aoti, but tensorrt 11.0.0.114, .* sm_90, float32; ort"):
        choose_target([SM90, ORT], wanted=TargetName("aoti"))


def test_all_reasons_are_given_if_nothing_fits(with_gpu):
    other_os = replace(SM90, os="plan9")
    with pytest.raises(BundleError) as error:
        choose_target([SM89, other_os, replace(SM90, version="11.1.0.7")])
    assert "sm_89, float32: it was built for sm_89, and NVIDIA H200 is sm_90" in str(error.value)
    assert f"it was built for plan9, this is {OS}" in str(error.value)
    assert "it was built with tensorrt 11.1.0.7, here is 11.0.0.114" in str(error.value)


def test_an_old_driver_is_refused(with_gpu):
    with_gpu[0] = replace(H200, driver=(12, 8))
    fit = find_fit(SM90)
    assert not fit.fits
    assert fit.reason == "the driver of NVIDIA H200 is for CUDA 12.8, but tensorrt 11 needs 13.1: install a newer driver"


def test_a_gpu_that_is_not_there_is_named(with_gpu):
    assert find_fit(SM90, DeviceName("cuda", 3)).reason == "device is cuda:3, but there are 1 GPUs, counted from 0"


def test_bfloat16_needs_ampere(with_gpu):
    with_gpu[0] = replace(H200, name="Tesla T4", capability=75)
    fit = find_fit(target("tensorrt", "cuda", "bfloat16", sm=[75]))
    assert fit.reason == "sm_75 has no bfloat16: compile with --dtype float16"


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [("11.0.0.114", "11.0.0.114", True), ("11.0.0.114", "11.1.0.7", True), ("11.1.0.7", "11.0.0.114", False)],
)
def test_version_compatible_engines_run_on_later_versions(with_gpu, monkeypatch, built, here, fits):
    monkeypatch.setattr(Library, "version", lambda self: here)
    fit = find_fit(target("tensorrt", "cuda", version=built, sm=[90], version_from=built))
    assert fit.fits == fits
    if not fits:
        assert fit.reason == f"it was built with tensorrt {built}, here is {here}"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_without_the_library_the_extra_is_named():
    fit = find_fit(SM90)
    assert isinstance(fit.error, MissingExtraError)
    assert fit.reason == "the tensorrt backend needs 'tensorrt', which is not installed: pip install 'cachec[tensorrt]'"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_the_only_target_keeps_the_kind_of_its_error():
    with pytest.raises(MissingExtraError, match=r"^tensorrt 11.0.0.114, \w+, cuda sm_90, float32 does not fit: "):
        choose_target([SM90])


@pytest.mark.parametrize(
    ("text", "name"),
    [("ort", TargetName("ort")), ("ort-cuda", TargetName("ort", "cuda")), ("tensorrt-rtx", TargetName("tensorrt-rtx"))],
)
def test_names_are_read_and_written(text, name):
    assert TargetName.parse(text, BACKENDS) == name
    assert str(name) == text


@pytest.mark.parametrize("text", ["", "cuda", "ort-gpu", "-cuda", "tensorrt-rtx-11", "ORT"])
def test_other_names_are_refused(text):
    with pytest.raises(InputError, match="unknown target"):
        TargetName.parse(text, BACKENDS)


def test_names_match_targets():
    assert ONNX_TARGET.matches(ORT)
    assert TargetName("ort", "cuda").matches(target("ort", "cuda"))
    assert TargetName("ort", "cuda").matches(ORT)  # which then has to run there
    assert not TargetName("ort", "cuda").matches(target("ort", "cpu"))
