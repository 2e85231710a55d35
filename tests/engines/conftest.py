"""The one bundle that the tests of this folder share, and the fakes of CUDA and TensorRT."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))  # its helpers


@pytest.fixture(scope="session")
def toys(once):
    """The toy for eager and ONNX Runtime: levels ``default`` (hidden cut), ``output`` (output cut) and ``uncached``."""
    from toy_bundle import KEY, SIGMAS, output_table, split_toy, toy_program, write_bundle

    from cachec.compiler.graphs.prepare import linear
    from cachec.compiler.methods.taylor import Taylor
    from cachec.compiler.tables.lower import lower_advance
    from cachec.compiler.tables.sampling import Sampling

    def make(out):
        more = {"output": lower_advance(output_table(), KEY, Sampling(SIGMAS, SIGMAS[:-1]))}
        write_bundle(linear(split_toy(head_axis=True)), toy_program(), Taylor(order=1), out, ("ort", "eager"), more=more)

    return once("toys.cachec", make)


@pytest.fixture(scope="session")
def onnx_toy(toys, tmp_path_factory):
    """The same with ONNX Runtime's engines only."""
    from engine_toys import rewrite

    from cachec.runtime.bundle import Bundle

    path = Path(shutil.copytree(toys, tmp_path_factory.mktemp("toys") / "onnx.cachec"))
    manifest = Bundle.open(path).manifest
    gone = {artifact.path for artifact in manifest.targets[1].engines.values()}
    files = {name: entry for name, entry in manifest.files.items() if name not in gone}
    rewrite(path, targets=manifest.targets[:1], files=files)
    shutil.rmtree((path / next(iter(gone))).parent)
    return path


@pytest.fixture
def request_of():
    """Conditions and noise of some seeds."""
    from cachec.runtime.noise import make_noise

    def make(*seeds):
        prompts = np.stack([make_noise(100 + seed, (8,)) for seed in seeds])
        return {"prompt": prompts}, np.stack([make_noise(seed, (6, 8)) for seed in seeds])

    return make


@pytest.fixture
def cuda(monkeypatch):
    """A fake CUDA runtime with one GPU of TensorRT's."""
    from fake_cuda import FakeCuda

    from cachec.engines import cuda_runtime

    fake = FakeCuda(memory=1 << 28, driver=13010, capability=(9, 0))
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    return fake


@pytest.fixture
def trt(monkeypatch, cuda):
    """A fake TensorRT on it."""
    from engine_toys import install
    from fake_tensorrt import Fake

    fake = Fake(enqueue=cuda.enqueue, is_capturing=cuda.is_capturing)
    install(monkeypatch, fake)
    return fake


@pytest.fixture
def bundle(onnx_toy, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(onnx_toy, tmp_path / "toy.cachec"))
