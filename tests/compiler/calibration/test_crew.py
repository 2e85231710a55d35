"""Who does the work, by the options: refused before anything slow begins."""

import pytest

from cachec.compiler.calibration import ray_actors
from cachec.compiler.calibration.crew import choose_crew, first_device
from cachec.compiler.calibration.processes import ProcessCrew
from cachec.compiler.calibration.ray_actors import RayCrew
from cachec.compiler.calibration.workers import Place
from cachec.compiler.options import WorkersWish
from cachec.runtime.errors import InputError


@pytest.fixture(autouse=True)
def ray_is_there(monkeypatch):
    monkeypatch.setattr(ray_actors, "need", lambda *_, **__: None)


def two_gpus(device):
    if device.kind == "cuda" and device.index > 1:
        raise InputError(f"device is {device}, but there are 2 GPUs")


def choose(device=None, default=None, **wish):
    return choose_crew(WorkersWish(**wish), device, two_gpus, default=default)


def test_without_options_this_process_does_it():
    assert choose("cuda:1") is None
    assert first_device(WorkersWish(), "cuda:1") == "cuda:1"


def test_a_process_for_each_device():
    wish = WorkersWish(devices="cuda,cuda:1")
    assert choose_crew(wish, None, two_gpus) == ProcessCrew((Place("cuda:0"), Place("cuda:1")))
    assert first_device(wish, None) == "cuda:0"


@pytest.mark.parametrize(
    ("workers", "device", "default", "crew"),
    [
        ("ray", None, None, RayCrew(None, None)),
        ("ray", None, "cpu", RayCrew(None, "cpu")),
        ("ray", "cuda", "cpu", RayCrew(None, "cuda")),
    ],
)
def test_ray_on_some_kind_of_device(workers, device, default, crew):
    assert choose(device, default, workers=workers) == crew


@pytest.mark.parametrize(
    ("wish", "device", "message"),
    [
        ({"workers": "ray", "devices": "cuda:0"}, None, "--workers and --devices contradict each other"),
        ({"devices": "cuda:0,cuda:1"}, "cuda", "--device and --devices contradict each other"),
        ({"devices": "cuda:0,cuda:1,cuda"}, None, "device cuda:0 is given twice"),
        ({"devices": "cpu,cpu"}, None, "device cpu is given twice"),
        ({"devices": "cuda:0,cuda:7"}, None, "device is cuda:7, but there are 2 GPUs"),
        ({"devices": "cpu,cuda:0"}, None, "devices are cpu, cuda:0: take devices of one kind"),
        ({"devices": ""}, None, "device is ''; use cpu, cuda"),
        ({"devices": "cuda:0,"}, None, "device is ''; use cpu, cuda"),
        ({"workers": "dask"}, None, "workers is 'dask'; use ray, or ray:HOST:PORT"),
        ({"workers": "ray:"}, None, "workers is 'ray:'; use ray"),
        ({"workers": "ray:auto"}, None, "--workers ray:auto names no cluster: write ray:HOST:PORT"),
        ({"workers": "ray"}, "cuda:1", "device is cuda:1, but Ray chooses among the GPUs itself: say cuda"),
        ({"workers": "ray"}, "tpu", "device is 'tpu'; use cpu, cuda"),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(wish, device, message):
    with pytest.raises(InputError, match=message):
        choose(device, **wish)
