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
from cachec.engines.tensorrt import TensorRTEngine, build_memory, plan_bytes, runs_on
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import BundleError, EngineError, InputError, OutputError

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


def set_room(monkeypatch, *, memory, disk):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(disk))
    monkeypatch.setattr("cachec.runtime.room.free_memory", lambda: memory)


@pytest.mark.parametrize(
    ("memory", "disk", "message"),
    [
        (3.9e9, 3e9, r"tensorrt takes 4.00 GB of memory, and this machine has 3.90 GB free: .* add-target on a larger machine"),
        (4.1e9, 1e9, r"tensorrt takes 1.72 GB of disk, and .* has 1.00 GB left"),
        (None, 3e9, r"tensorrt takes 1.72 GB of the GPU's memory, and .* has 268.44 MB free"),
    ],
)
def test_a_build_that_there_is_no_room_for_is_refused_with_what_it_takes(tmp_path, trt, monkeypatch, memory, disk, message):
    set_room(monkeypatch, memory=memory, disk=disk)
    with pytest.raises((EngineError, OutputError), match=message):
        get_builder("tensorrt").check_room(1.55e9, tmp_path, GPU, DEFAULTS)


def test_what_a_build_takes_is_said_and_stripped_engines_take_no_disk(tmp_path, trt, monkeypatch, caplog):
    set_room(monkeypatch, memory=5e9, disk=1e6)
    with caplog.at_level(logging.INFO, logger="cachec"):
        get_builder("tensorrt").check_room(1e8, tmp_path, GPU, BuildOptions(strip=True))
    assert "takes up to 652.00 MB of memory and 0.00 B of disk" in caplog.text


def test_add_target_asks_before_it_builds(bundle, trt, monkeypatch):
    set_room(monkeypatch, memory=1e6, disk=1e12)
    trt.calls.clear()
    with pytest.raises(EngineError, match=r"takes 4\d\d.\d\d MB of memory, and this machine has 1.00 MB free"):
        add_targets(bundle, ["tensorrt"])
    assert not trt.called("Builder", "create_network")


def test_the_law_holds_for_what_was_measured():
    """bench/ENGINES.md: bytes of ONNX files, of all engines, and of memory at the peak."""
    for weights, engines, peak in [(31.2e6, 39.5e6, 0.47e9), (657.7e6, 666.9e6, 1.80e9), (329.3e6, 340.1e6, 1.13e9)]:
        assert engines <= plan_bytes(weights) <= 1.15 * engines
        assert peak <= build_memory(weights) <= 1.1 * peak
