"""Calibration and training on a GPU that is pretended: results are those of the CPU, and nothing stays behind there."""

import numpy as np
import pytest
import torch
from pretend_gpu import PretendGpu
from safetensors.numpy import load_file

import cachec.compiler.commands.calibrate as calibrate
import cachec.compiler.commands.train as train
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.frontend import check, find_calibrations, make_programs
from cachec.compiler.models import find_model, load_model
from cachec.compiler.request import make_request
from cachec.runtime.errors import InputError


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    with PretendGpu():
        yield


def assert_same(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-7, err_msg=name)


def calibrated(toy, out, **options):
    calibrate.calibrate_to_file(str(toy), out, num=12, steps=4, reference_steps=8, **options)
    return out


def test_a_calibration_is_that_of_the_cpu_and_says_its_precision(toy_directory, tmp_path, gpu):
    there = calibrated(toy_directory, tmp_path / "there", device="cuda")
    assert_same(there, calibrated(toy_directory, tmp_path / "here"))
    half = calibrated(toy_directory, tmp_path / "half", device="cuda", dtype="bfloat16")
    spec = find_model(str(toy_directory))
    request = make_request(spec, method="gram", budget=2, steps=4, reference_steps=8, calibration=half, dtype="bfloat16")
    with pytest.raises(InputError, match="precision"):  # which is compiled for the CPU
        check(load_model(spec), request)


def test_a_predictor_is_that_of_the_cpu(toy_directory, tmp_path, gpu):
    options = {"steps": 6, "interval": 3, "options": {"max_rounds": "1"}, "force": False}
    for name, device in (("here", "cpu"), ("there", "cuda")):
        train.train_to_file(str(toy_directory), tmp_path / name, device=device, **options)
    assert_same(tmp_path / "there", tmp_path / "here")


@pytest.mark.parametrize(("method", "options"), [("gram", {}), ("l2p", {}), ("bns", {"updates": "9"}), ("gram-hidden", {})])
def test_a_fit_is_that_of_the_cpu(toy_directory, tmp_path, gpu, method, options):
    def fitted(device):
        model = load_model(find_model(str(toy_directory)))
        wish = {"budget": 2, "steps": 4, "options": options, "prompts": tmp_path / "prompts.txt"}
        request = make_request(model.spec, method=method, device=device, **wish)
        calibrations = find_calibrations(model, request, check(model, request), tmp_path / device)
        return make_programs(model, request, {}, calibrations, None).by_level

    (tmp_path / "prompts.txt").write_text("\n".join(default_prompts("avatars", "train")[:24]))
    there, here = fitted("cuda"), fitted("cpu")
    assert there.keys() == here.keys()
    for level, program in there.items():
        assert program.instructions == here[level].instructions
        np.testing.assert_allclose(program.coefficients, here[level].coefficients, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(program.timesteps, here[level].timesteps, rtol=1e-5)


def test_a_gpu_that_is_not_there_is_refused(toy_directory, tmp_path):
    with pytest.raises(InputError, match="PyTorch .* sees no GPU here"):
        calibrated(toy_directory, tmp_path / "x", device="cuda")
    with pytest.raises(InputError, match="dtype is float16, but on the CPU models are run in float32"):
        calibrated(toy_directory, tmp_path / "x", dtype="float16")
    assert not list(tmp_path.iterdir())
