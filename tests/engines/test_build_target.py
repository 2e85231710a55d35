"""Building into a bundle: what is planned, what is checked first, what is sealed."""

import logging
from pathlib import Path

import pytest

from cachec.engines.build_target import TIMING, check_build, device_for, keep_timing, plan_target, seal_all
from cachec.engines.targets import TargetName
from cachec.runtime.build_options import DEFAULTS, BuildOptions, SizeRange
from cachec.runtime.bundle import ANY_DEVICE
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import InputError
from cachec.runtime.work import LOCK
from cachec.runtime.write import BundleWriter

CUDA = DeviceName("cuda", 1)
ORT, EAGER, RTX = (TargetName(name) for name in ("ort", "eager", "tensorrt-rtx"))


class Nothing:
    """Sources without graphs."""

    precision, shape_bucket, signatures = "float32", "64x64, 16 text tokens", {}


@pytest.mark.parametrize(
    ("name", "device", "wanted"),
    [
        (ORT, HOST, (ANY_DEVICE, {})),
        (ORT, CUDA, (ANY_DEVICE, {})),
        (TargetName("ort", "cuda"), HOST, ("cuda", {})),
        (TargetName("aoti"), HOST, ("cpu", {})),
        (TargetName("aoti"), CUDA, ("cuda", {})),
        (TargetName("ort-tensorrt"), HOST, ("cuda", {})),
    ],
)
def test_targets_are_for_any_device_unless_they_are_bound(name, device, wanted):
    options = BuildOptions(sizes={"batch": SizeRange(1, 2, 3)})
    target = plan_target(Nothing(), name, device=device, options=options)
    assert (target.device, target.sizes) == wanted
    assert (target.backend, target.precision, target.engines) == (name.backend, "float32", {})


@pytest.mark.parametrize(
    ("name", "device", "wanted"),
    [(ORT, CUDA, CUDA), (TargetName("ort", "cpu"), CUDA, HOST), (RTX, HOST, DeviceName("cuda")), (RTX, CUDA, CUDA)],
)
def test_where_a_target_is_built_for(name, device, wanted):
    assert device_for(name, device) == wanted


@pytest.mark.parametrize(
    ("names", "options", "batch", "message"),
    [
        (
            [ORT, EAGER],
            BuildOptions(level=1, strip=True),
            1,
            "optimization level, stripped weights is for none of the targets o",
        ),
        ([ORT], DEFAULTS, 2, "max-batch is 2, but ort takes any batch"),
        ([TargetName("tensorrt-rtx", "cpu")], DEFAULTS, 1, "tensorrt-rtx runs on cuda only; call it tensorrt-rtx"),
    ],
)
def test_what_cannot_be_built_is_refused(names, options, batch, message):
    with pytest.raises(InputError, match=message):
        check_build(names, "float32", HOST, options, max_batch=batch)


def test_options_that_one_target_ignores_are_said(caplog):
    pytest.importorskip("tensorrt_rtx_bindings")
    with caplog.at_level(logging.WARNING, logger="cachec"):
        check_build([RTX, ORT], "float32", HOST, BuildOptions(level=5))
    assert [record.getMessage() for record in caplog.records] == ["optimization level is not for ort"]


@pytest.mark.parametrize("given", [{"strip": True}, {"version_compatible": True, "compatibility": "ampere-plus"}])
def test_options_of_other_targets_are_not_applied(given):
    from cachec.engines import get_builder

    options = BuildOptions(level=5, **given)
    kept = {name: options.only(get_builder(name).options) for name in ("tensorrt-rtx", "ort", "tensorrt")}
    assert kept == {"tensorrt-rtx": BuildOptions(level=5), "ort": DEFAULTS, "tensorrt": options}


def test_files_are_sealed_once_and_empty_folders_go(tmp_path):
    with BundleWriter(tmp_path / "toy.cachec", force=False) as writer:
        empty, full = writer.directory("engines/empty"), writer.directory("engines/full")
        (full / "weights.bin").write_bytes(b"shared")
        seal_all(writer, full)
        seal_all(writer, full)
        seal_all(writer, empty)
        (name,) = writer.files
        assert Path(name).name.startswith("weights-")
        assert not empty.exists()


def test_timings_are_collected_by_machine_without_the_lock(tmp_path):
    with BundleWriter(tmp_path / "toy.cachec", force=False) as writer:
        assert keep_timing(writer, tmp_path / "none") == {}
        folder = tmp_path / "timings"
        folder.mkdir()
        (folder / LOCK).write_bytes(b"")
        (folder / "tensorrt-11_sm90.timing").write_bytes(b"kernels")
        kept = keep_timing(writer, folder)
        assert kept.keys() == {"tensorrt-11_sm90"}
        assert kept["tensorrt-11_sm90"].startswith(f"{TIMING}/")
