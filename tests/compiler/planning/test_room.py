"""What a command is certain to take is compared with what there is, before anything is captured."""

from collections import namedtuple

import pytest
from toy import TOKENS, WIDTH, ToyDiT
from toy_model import SETTINGS, ToyModel

from cachec.compiler import frontend
from cachec.compiler.commands.calibrate import calibrate_to_file
from cachec.compiler.models import find_model, load_model
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.planning import room
from cachec.compiler.planning.room import check_compile, check_evaluation, check_training, weight_bytes
from cachec.compiler.request import make_request
from cachec.engines import torch_device
from cachec.engines.targets import TargetName
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import EngineError, OutputError

NUMBERS = sum(parameter.numel() for parameter in ToyDiT(head_axis=True).parameters())
CUDA = DeviceName("cuda")


@pytest.fixture
def model(toy_directory):
    return load_model(find_model(str(toy_directory)))


def test_weights_count_that_are_yet_to_be_read(model):
    assert weight_bytes(model, "bfloat16") == 2 * NUMBERS
    assert weight_bytes(ToyModel(), "bfloat16") == 0


@pytest.mark.parametrize(
    ("targets", "copies"), [("ort", 1), ("tensorrt", 1), ("ort eager", 2), ("aoti eager", 2), ("ort tensorrt aoti", 2)]
)
def test_the_disk_must_hold_the_weights_of_every_target(model, tmp_path, monkeypatch, targets, copies):
    names, work = [TargetName(name) for name in targets.split()], tmp_path / "work"
    work.mkdir()
    (work / "weights.part").write_bytes(bytes(100))
    free = copies * 4 * NUMBERS - 100
    for size, fits in ((free, True), (free - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, size=size: namedtuple("usage", "free")(size))
        if fits:
            check_compile(model, SETTINGS, names, tmp_path / "out", work)
        else:
            with pytest.raises(OutputError, match="the bundle takes .* of disk"):
                check_compile(model, SETTINGS, names, tmp_path / "out", work)


def test_large_models_need_memory_and_more_of_it_where_they_are_held(model, tmp_path, monkeypatch):
    monkeypatch.setattr("cachec.runtime.room.free_memory", lambda: int(room.COMPILE_MEMORY))
    check_compile(model, SETTINGS, [TargetName("eager")], tmp_path / "out", tmp_path)
    monkeypatch.setattr(room, "is_large", lambda module: True)
    check_compile(model, SETTINGS, [TargetName("ort")], tmp_path / "out", tmp_path)
    with pytest.raises(
        EngineError, match=r"compiling to eager takes 1.70 GB of memory, .*: stop other programs, or compile with"
    ):
        check_compile(model, SETTINGS, [TargetName("eager")], tmp_path / "out", tmp_path)


def test_a_model_is_run_where_its_weights_and_a_sample_have_room(model, monkeypatch):
    free = {"cpu": 4 * NUMBERS + 250, "cuda": 2 * NUMBERS + 150}
    monkeypatch.setattr(room, "free_memory", lambda: free["cpu"])
    monkeypatch.setattr(room, "free_bytes", lambda device: free[device.kind])
    assert check_evaluation(model, "float32", HOST) is None
    assert check_evaluation(model, "float32", HOST, 100) == 2
    assert check_evaluation(model, "bfloat16", CUDA, 100) == 1
    with pytest.raises(EngineError, match=r"in float32 takes .* are weights.*cuda:0 has .* free: stop what else uses it"):
        check_evaluation(model, "float32", CUDA)
    with pytest.raises(EngineError, match=r"this machine has .* free: run it on a GPU with --device cuda"):
        check_evaluation(model, "float32", HOST, 251)
    free["cpu"] = None
    assert check_evaluation(model, "float32", HOST, 1 << 60) is None


def test_a_request_that_runs_the_model_is_refused_before_it_is_captured(model, monkeypatch, captures):
    monkeypatch.setattr(room, "free_memory", lambda: 100)
    frontend.check(model, make_request(model.spec, method="adams", steps=4, schedule="0,2"))
    for options in ({"method": "gram", "budget": 2}, {"method": "lesa", "interval": 2}):
        with pytest.raises(EngineError, match="running the model in float32 takes"):
            frontend.check(model, make_request(model.spec, steps=8, **options))
    with pytest.raises(EngineError, match="running the model in float32 takes"):
        frontend.evaluator_of(model, SETTINGS)
    assert not captures


def test_records_have_room_before_anything_is_captured_or_run(model, tmp_path, monkeypatch, captures):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1000))
    options = {"method": "gram", "budget": 2, "steps": 4}
    with pytest.raises(OutputError, match="the (bundle|calibration) takes"):
        compile_bundle(model, make_request(model.spec, **options), tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(20_000))
    with pytest.raises(
        OutputError, match="the calibration takes .* kB of disk, and .* has 20.00 kB left: .* take fewer prompts"
    ):
        compile_bundle(model, make_request(model.spec, **options), tmp_path / "out")
    with pytest.raises(OutputError, match="the calibration takes"):
        calibrate_to_file(str(model.spec.source), tmp_path / "stats", steps=4)
    assert not captures
    assert list(tmp_path.iterdir()) == []


def test_a_training_has_room_for_the_features_that_it_keeps(model, tmp_path, monkeypatch):
    size = 10 * SETTINGS.steps * TOKENS * WIDTH * 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(size - 8))
    with pytest.raises(OutputError, match="recording the runs to train on takes"):
        check_training(model, SETTINGS, 10, tmp_path / "work")
    monkeypatch.setattr(room, "MAX_TRAINING_BYTES", size - 8)
    check_training(model, SETTINGS, 10, tmp_path / "work")
    monkeypatch.setattr("cachec.runtime.room.free_memory", lambda: size - 1)  # in bfloat16, twice
    with pytest.raises(EngineError, match="recording the runs to train on takes"):
        check_training(model, SETTINGS, 10, tmp_path / "work")


def test_samples_are_run_as_many_at_once_as_have_room(model, monkeypatch):
    activations = frontend.memory_facts(frontend.prepare(model, SETTINGS))["activations"]
    monkeypatch.setattr(room, "free_memory", lambda: weight_bytes(model, "float32") + 3 * activations)
    assert frontend.evaluator_of(model, SETTINGS)._max_batch == 3


def test_what_pytorch_holds_and_does_not_use_is_free(monkeypatch):
    for name, value in {"memory_reserved": 30, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch_device.torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch_device.torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert torch_device.free_bytes(CUDA) == 110
