"""Makes the helpers of this directory importable (``from toy import …``), in the tree and beside an installed wheel."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network
# PyTorch keeps what operators give for fake tensors, and rebuilds each entry once: three blocks of FLUX are captured
# in a third less time without, 24 in a quarter more
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side must not fight over cores; what they start inherits it
    os.environ["OMP_NUM_THREADS"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; tests and their children use it
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "engines"))  # its fakes
sys.path.append(str(Path(__file__).parent / "passes"))  # its small models
sys.path.append(str(Path(__file__).parent.parent))  # bench/, where the source tree is there


LONG = (  # files of more than a few seconds, the longest first; a line shares what is slow to make
    ("test_toy.py", "test_run.py"),
    ("test_tiny_flux.py", "test_pictures_tiny_flux.py", "test_reference_requests.py"),
    ("test_accelerate.py",),
    ("test_disca_toy.py",),
    ("test_sizes.py", "test_own_levels.py"),
    ("test_examples.py",),
    ("test_blocks.py",),
    ("test_two_transformers.py",),
    ("test_as_transformer.py",),
    ("test_lora_bundles.py",),
    ("test_cast_precision.py",),
    ("test_gram_toy.py",),
    ("test_conformance.py",),
    ("test_late_targets.py",),
    ("test_compile.py",),
    ("test_auto_target.py",),
    ("test_train.py",),
    ("test_aoti.py",),
    ("test_families.py",),
    ("test_pipeline.py",),
    ("test_speed.py",),
    ("test_frontend.py",),
    ("test_converters.py",),
    ("test_comparisons.py",),
    ("test_cli.py",),
    ("test_calibrate.py",),
    ("test_engines.py",),
    ("test_lanes_toy.py",),
)
PLACES = {name: place for place, names in enumerate(LONG) for name in names}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file go to one process, which makes what they share once; long files first, to end at the same time."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            place = PLACES.get(Path(file).name)
            return file if place is None else LONG[place][0]

    config.option.loadscopereorder = False  # by number of tests, which says little
    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: PLACES.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)``: what ``make(path)`` puts at a path; made by the first process that wants it, for all."""
    from cachec.runtime.work import holding

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def get(name, make):
        with holding(root / f"{name}.lock", f"another process makes {name}", wait=True):
            if not (root / name).exists():
                make(root / name)
        return root / name

    return get


@pytest.fixture(scope="session")
def saved_family(once, tmp_path_factory):
    """``saved_family(name)``: the directory of a small pipeline of ``families.py``; that from outside is found, too."""
    from tests.families import FAMILIES
    from tests.outside import install

    install(tmp_path_factory.mktemp("site"))

    made = {family.name: family for family in FAMILIES}
    return lambda name: once(name, lambda path: made[name].make().save_pretrained(path))


@pytest.fixture(scope="session")
def flux_directory(saved_family):
    """The small FLUX pipeline's."""
    return saved_family("flux")


@pytest.fixture(scope="module")
def flux_model(flux_directory):
    """The same, loaded."""
    from cachec.compiler.models import find_model, load_model

    return load_model(find_model(str(flux_directory)))


@pytest.fixture(scope="session")
def several(once, flux_directory):
    """Small FLUX for two sizes and four numbers of steps; three and five steps have noise levels of their own."""
    from toy_product import succeed

    def compile_several(out):
        given = ("--method", "taylor", "--budget", "3", "--text-tokens", "8", "--target", "ort", "--size", "32x48,64x48")
        levels = ("--steps", "6,4,3,5", "--sigmas", "1,0.6,0.3;1,0.9,0.7,0.4,0.2")
        assert "64x48, 4 steps" in succeed("compile", flux_directory, *given, *levels, "-o", out)

    return once("several.cachec", compile_several)


@pytest.fixture(scope="session")
def toy_split():
    from toy_bundle import split_toy

    return split_toy()


@pytest.fixture(scope="session")
def toy_bundle(once):
    from toy_bundle import split_toy, write_toy_bundle

    return once("toy.cachec", lambda out: write_toy_bundle(split_toy(), out))


@pytest.fixture(scope="session")
def lesa_bundle(once):
    """tiny-flux with the predictor that ships: ten of fifty steps computed, with its text encoders and decoder."""
    from toy_product import succeed

    def compile_lesa(out):
        given = ("--method", "lesa", "--interval", "7", "-o", out)
        assert "ships with cachec" in succeed("compile", "tiny-flux", *given)

    return once("lesa.cachec", compile_lesa)


@pytest.fixture(scope="session")
def three_steps(once):
    """``three_steps(name)``: a model of ``cachec-models`` with its text encoders and decoder, two of three steps computed."""
    from toy_product import succeed

    from cachec.compiler.models.distribution import models_folder

    def compiled(name):
        if models_folder() is None:
            pytest.skip(f"{name} comes with cachec-models, which is not installed: pip install ./reference/models")
        given = ("--components", "all", "--method", "reuse", "--steps", "3", "--budget", "2", "--target", "ort")
        return once(f"{name}.cachec", lambda out: succeed("compile", name, *given, "-o", out))

    return compiled


@pytest.fixture(scope="session")
def toy_family():
    """Lets the command line in this process load toys."""
    import cachec

    cachec.register_family("ToyPipeline", "toy_model:ToyModel")


@pytest.fixture(scope="session")
def toy_directory(once, toy_family):
    """A pipeline directory of the toy, as ``cachec compile`` takes it."""
    from toy_model import save_toy

    return once("toy", save_toy)


@pytest.fixture(scope="session")
def toy_training(once):
    """What ``toy_predictor`` is trained with: for moments, for 8 steps of which 0, 1, 2, 3 and 5 are computed."""
    from toy_product import TOY_SCHEDULE

    from cachec.compiler.calibration.prompts import default_prompts

    prompts = once("prompts.txt", lambda path: path.write_text("\n".join(default_prompts("avatars", "train")[:24])))
    return [*TOY_SCHEDULE, "--set", "max_rounds=3", "--seed", "5", "--prompts", prompts]


@pytest.fixture(scope="session")
def toy_predictor(once, toy_directory, toy_training):
    """A predictor file of LESA."""
    from toy_product import succeed

    return once("lesa.safetensors", lambda out: succeed("train", toy_directory, *toy_training, "-o", out))


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
    """LESA on the toy: ``both`` for two back ends, and ``kept``, which is not folded."""
    from toy_product import TOY_SCHEDULE, succeed

    root = tmp_path_factory.mktemp("bundles")
    eager = ["--target", "eager"]
    for name, options in {"both": ["--target", "ort", *eager], "kept": ["--fold", "none", *eager]}.items():
        succeed("compile", toy_directory, *TOY_SCHEDULE, "--predictor", toy_predictor, *options, "-o", root / name)
    return root
