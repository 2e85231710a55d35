"""AOTInductor on a graph of one layer, compiled once: it takes C++."""

import gc
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toys import layer, sources

from cachec.engines.aoti import BUILDER, AotiEngine, check_loading
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import LoadOptions
from cachec.runtime.errors import BundleError, EngineError, InputError

SIDE = 3000  # weights of 36 MB: above 32 MB, glibc keeps nothing that is freed (mallopt(3), M_MMAP_THRESHOLD)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    module, plan = layer(SIDE)
    out = tmp_path_factory.mktemp("aoti")
    return module, {plan.name: plan.signature}, BUILDER.build(sources(out, plan), out)


def test_calls_give_what_the_module_gives(built):
    module, signatures, files = built
    with AotiEngine.load(files, signatures, LoadOptions(threads=1))["compute"] as engine:
        for batch in (1, 3):
            x = np.random.default_rng(batch).standard_normal((batch, SIDE), np.float32)
            y, total = np.empty((batch, SIDE), np.float32), np.empty(batch, np.float32)
            engine.context().run({"x": x}, {"y": y})
            engine.context().run({"x": x}, {"total": total, "y": y})
            with torch.no_grad():
                wanted = module(torch.from_numpy(x))
            np.testing.assert_allclose(y, wanted["y"], atol=1e-5)
            np.testing.assert_allclose(total, wanted["total"], atol=2e-4)


def test_closed_engines_give_their_weights_back(built):
    def open_and_close():
        AotiEngine.load(built[2], built[1])["compute"].close()
        gc.collect()

    open_and_close()
    before = resident_bytes()
    for _ in range(4):
        open_and_close()
    assert resident_bytes() - before < 4 * SIDE**2  # of the four copies that were loaded, not one is left


def test_a_graph_that_is_missing_and_a_file_that_is_none_are_refused(built, tmp_path):
    _, signatures, files = built
    with pytest.raises(BundleError, match="holds no graph forecast: compile the bundle again"):
        AotiEngine.load({**files, "forecast": files["compute"]}, signatures)
    (tmp_path / "model.pt2").write_bytes(b"nothing of that kind")
    with pytest.raises(BundleError, match="cannot load .*model.pt2"):
        AotiEngine.load({"compute": tmp_path / "model.pt2"}, signatures)


def test_it_loads_onto_the_first_gpu_only(monkeypatch):
    monkeypatch.setattr("cachec.engines.torch_device.check_device", lambda name: None)
    with pytest.raises(InputError, match="device is cuda:1, but aoti loads onto the first GPU only"):
        AotiEngine.check_target(DeviceName("cuda", 1), "float32")


def test_without_a_compiler_the_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Exception, match=r"there is no g\+\+ or clang\+\+: install one"):
        BUILDER.build(sources(tmp_path), tmp_path)


def test_a_crash_while_loading_ends_another_process(built, monkeypatch):
    path, cuda = built[2]["compute"], DeviceName.parse("cuda")
    check_loading(path, cuda)
    monkeypatch.setattr("cachec.engines.aoti.LOADING", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(EngineError, match=r"torch .* crashes \(signal 11\) when it loads what it compiled for cuda:0"):
        check_loading(path, cuda)
    monkeypatch.setattr("cachec.engines.aoti.LOADING", "raise RuntimeError('no kernel image')")
    with pytest.raises(EngineError, match="fails: RuntimeError: no kernel image when it loads"):
        check_loading(path, cuda)


def test_other_weights_are_read_where_the_file_says(built, tmp_path):
    module, signatures, files = built
    other = 2 * module.layer.weight.detach()
    (tmp_path / "w.bin").write_bytes(bytes(16) + other.T.contiguous().numpy().tobytes())
    facts = {"begin": 16, "shape": [SIDE, SIDE], "dtype": "float32", "axes": [1, 0]}
    said = {"weights": "w.bin", "constants": {"layer.weight": facts}}
    (tmp_path / "w.json").write_text(json.dumps(said))
    options = LoadOptions(weights={"compute": tmp_path / "w.json"})
    x, y = np.ones((1, SIDE), np.float32), np.empty((1, SIDE), np.float32)
    with AotiEngine.load(files, signatures, options)["compute"] as engine:
        engine.context().run({"x": x}, {"y": y})
    wanted = torch.sin(torch.from_numpy(x) @ other.T + module.layer.bias.detach())
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    for damage, message in (
        ({"begin": 4 * SIDE**2}, "w.json cannot be read: w.bin is cut off"),
        ({"shape": [4]}, "no constant"),
    ):
        (tmp_path / "w.json").write_text(json.dumps({**said, "constants": {"layer.weight": {**facts, "axes": None, **damage}}}))
        with pytest.raises(BundleError, match=message):
            AotiEngine.load(files, signatures, options)
