"""Makes the helpers of this directory importable (``from toy import …``), in the tree and beside an installed wheel."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side must not fight over cores; what they start inherits it
    os.environ["OMP_NUM_THREADS"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; tests and their children use it
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "engines"))  # its fakes
sys.path.append(str(Path(__file__).parent.parent))  # bench/, where the source tree is there


TOGETHER = (  # files whose tests share what is slow to make: of two processes, one makes it
    {"test_cli.py", "test_compile.py", "test_report.py", "test_run.py", "test_toy.py"},
    {"test_accelerate.py", "test_drop_in.py"},
    *({name} for name in ("test_add_target.py", "test_aoti.py", "test_converters.py", "test_gpu_check.py")),
    *({name} for name in ("test_gram_toy.py", "test_tiny_flux.py")),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests of such files go to one process; every other test to the next that is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = Path(nodeid.partition("::")[0]).name
            return next((min(files) for files in TOGETHER if name in files), nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def toy_split():
    from toy_bundle import split_toy

    return split_toy()


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory, toy_split):
    from toy_bundle import write_toy_bundle

    return write_toy_bundle(toy_split, tmp_path_factory.mktemp("bundles") / "toy.cachec")


@pytest.fixture(scope="session")
def toy_family():
    """Lets the command line in this process load toys."""
    import cachec

    cachec.register_family("ToyPipeline", "toy_model:ToyModel")


@pytest.fixture(scope="session")
def toy_directory(tmp_path_factory, toy_family):
    """A pipeline directory of the toy, as ``cachec compile`` takes it."""
    from toy_model import save_toy

    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def toy_predictor(tmp_path_factory, toy_directory):
    """A predictor file: LESA, trained for moments, for 8 steps of which 0, 1, 2, 3 and 5 are computed."""
    import cachec.compiler.commands.train as train

    out = tmp_path_factory.mktemp("predictors") / "toy.safetensors"
    train.train_to_file(str(toy_directory), out, force=False, steps=8, interval=3, options={"max_rounds": "3"})
    return out


@pytest.fixture
def captures(toy_family):
    """The toys that were captured while the test ran, seen by a hook on their calls."""
    import torch
    from toy import ToyDiT

    seen = []

    def look(module, given):
        if isinstance(module, ToyDiT) and torch.compiler.is_exporting():
            seen.append(module)

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        yield seen


@pytest.fixture(scope="session")
def toy_bundles(tmp_path_factory, toy_directory, toy_predictor):
    """LESA on the toy: folded and not, on two back ends."""
    from toy_product import TOY_SCHEDULE, succeed

    root = tmp_path_factory.mktemp("bundles")
    for name, options in {"ort": [], "eager": ["--target", "eager"], "kept": ["--fold", "none", "--target", "eager"]}.items():
        succeed("compile", toy_directory, *TOY_SCHEDULE, "--predictor", toy_predictor, *options, "-o", root / name)
    return root
