"""What is said of TensorRT's engines before anything is loaded, and what is asked of a machine."""

import logging
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from engine_toys import install
from fake_tensorrt import Fake

import cachec
from cachec.engines import get_builder
from cachec.engines.add_target import add_targets
from cachec.engines.tensorrt import TensorRTEngine, check_room, runs_on
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import BundleError, EngineError, InputError

GPU = DeviceName("cuda")


@pytest.fixture
def path(bundle, trt):
    add_targets(bundle, ["tensorrt"])
    trt.calls.clear()
    return bundle


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("11.0.1.5", r"it was built with tensorrt 11\.0\.0\.114, here is 11\.0\.1\.5"),
        ("10.16.1.2", r"tensorrt is version 10\.16\.1\.2, but the tensorrt backend is written for 11"),
    ],
)
def test_another_version_is_refused_before_anything_is_loaded(path, monkeypatch, cuda, version, message):
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
def test_another_machine_is_refused_before_anything_is_loaded(path, trt, cuda, change, message):
    vars(cuda).update(change)
    with pytest.raises((BundleError, InputError), match=message):
        cachec.load(path, target="tensorrt")
    assert not trt.calls


def test_onnx_runtime_is_used_instead_and_that_is_said(path, cuda, caplog, request_of):
    cuda.capability = (8, 9)
    with cachec.load(path) as loaded:
        assert loaded.target.backend == "ort"
        assert np.isfinite(loaded.session().run(*request_of(1))).all()
    assert "does not fit: it was built for sm_90, and Fake GPU is sm_89" in caplog.text
    assert "using target ort 1." in caplog.text


def test_hardware_compatibility_is_warned_about_and_widens_the_target(bundle, trt, cuda, caplog):
    add_targets(bundle, ["tensorrt"], options=BuildOptions(compatibility="ampere-plus"))
    (value,) = {value for (value,) in trt.called("IBuilderConfig", "hardware_compatibility_level=")}
    assert value.name == "AMPERE_PLUS"
    assert "hardware compatibility ampere-plus costs some speed" in caplog.text
    cuda.capability = trt.sm = (8, 6)
    with cachec.load(bundle) as loaded:
        assert loaded.target.backend == "tensorrt"


def test_version_compatible_engines_may_bring_host_code_and_others_may_not(path, trt, monkeypatch, cuda):
    cachec.load(path).close()
    assert not trt.called("Runtime", "engine_host_code_allowed=")
    add_targets(path, ["tensorrt"], force=True, options=BuildOptions(version_compatible=True))
    assert {flag.name for (flag,) in trt.called("IBuilderConfig", "set_flag")} == {"VERSION_COMPATIBLE"}
    newer = Fake(version="11.1.0.7", enqueue=cuda.enqueue)
    install(monkeypatch, newer)
    cachec.load(path, target="tensorrt").close()
    assert set(newer.called("Runtime", "engine_host_code_allowed=")) == {(True,)}


def test_needs_are_what_was_asked_for(trt):
    builder = get_builder("tensorrt")
    assert builder.needs(GPU, DEFAULTS) == {"sm": [90], "cuda": "13.1", "gpu": "Fake GPU"}
    options = BuildOptions(compatibility="ampere-plus", strip=True)
    assert builder.needs(GPU, options) == {**builder.needs(GPU, DEFAULTS), "compatibility": "ampere-plus", "stripped": True}
    assert TensorRTEngine.is_made_for(builder.needs(GPU, DEFAULTS), GPU)
    assert not TensorRTEngine.is_made_for(builder.needs(GPU, options), GPU)
    assert builder.timing_file(DEFAULTS, GPU) is None
    kept = builder.timing_file(BuildOptions(timing_cache=Path("timings")), GPU)
    assert kept == Path("timings/tensorrt-11.0.0.114_sm90.timing")
    assert get_builder("tensorrt-rtx").vendor.keeps_timings is False


def test_the_builder_runs_on_gpus_only_and_says_so(trt):
    with pytest.raises(InputError, match="device is cpu, but tensorrt runs on NVIDIA GPUs only"):
        get_builder("tensorrt").check_build(DeviceName("cpu"), "float32", DEFAULTS)
    get_builder("tensorrt").check_build(GPU, "bfloat16", DEFAULTS)


@pytest.mark.parametrize(
    ("capability", "needs", "runs"),
    [
        (90, {"sm": [90]}, True),
        (89, {"sm": [90]}, False),
        (120, {"sm": [80, 86, 89, 120]}, True),
        (90, {"sm": [80], "compatibility": "ampere-plus"}, True),
        (75, {"sm": [80], "compatibility": "ampere-plus"}, False),
        (89, {"sm": [86], "compatibility": "same-capability"}, False),
    ],
)
def test_compute_capabilities(capability, needs, runs):
    assert runs_on(capability, needs) == runs


def test_a_build_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch, caplog):
    (tmp_path / "compute.onnx").write_bytes(b"0" * 1000)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(5e6))
    onnx = {"compute": tmp_path / "compute.onnx"}
    with caplog.at_level(logging.INFO), pytest.raises(EngineError, match=r"take about 0.0 GB, and the disk has 0.0 GB left"):
        check_room(onnx, tmp_path, DEFAULTS)
    assert "building takes up to 0.40 GB of memory and 0.01 GB of disk" in caplog.text
    check_room(onnx, tmp_path, BuildOptions(strip=True))
