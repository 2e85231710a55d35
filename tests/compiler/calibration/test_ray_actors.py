"""Workers on Ray: a local cluster of two, one of which is killed; and what is found out before Ray is started."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest
from toy_workers import FormulaRecorder, check_death

from cachec.compiler.calibration.ray_actors import RayCrew
from cachec.compiler.calibration.workers import at_work
from cachec.runtime.errors import InputError, MissingExtraError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_killed_actor_had_is_done_by_the_other(tmp_path, caplog, monkeypatch):
    import ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # so that actors find the recorder
    with at_work(RayCrew(None, "cpu", cores=1), FormulaRecorder(mark=tmp_path / "died")) as recorders:
        assert recorders.facts.device == "cpu"
        check_death(recorders, tmp_path)
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "is lost: ActorDiedError" in caplog.text
    assert "1 are left" in caplog.text
    assert not ray.is_initialized()


def test_an_address_at_which_nobody_answers_is_found_out_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=rf"no Ray cluster answers at 127.0.0.1:{port} \(.*refused"):
        RayCrew(f"127.0.0.1:{port}", None).check()


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":6379", "//localhost:10001x", "localhost:0", "localhost:70000"]
)
def test_what_is_no_address_is_refused(address):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="names no cluster: write ray:HOST:PORT"):
        RayCrew(address, None).check()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"--workers ray needs 'ray'.*pip install 'cachec\[ray\]'"):
        RayCrew(None, None).check()


def cluster(*machines):
    nodes = [{"NodeID": f"n{i}", "Alive": True, "Resources": has} for i, has in enumerate(machines)]
    return SimpleNamespace(nodes=lambda: [*nodes, {"NodeID": "gone", "Alive": False, "Resources": {"GPU": 8.0}}])


@pytest.mark.parametrize(
    ("machines", "kind", "shares"),
    [
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0}], None, [("n0", 0, None, None)] * 2),
        ([{"CPU": 16.0, "GPU": 1.0}], "cuda", [("n0", 0, "cuda", None)]),
        ([{"CPU": 16.0, "GPU": 2.0}], "cpu", [("n0", 4, "cpu", 4)] * 4),
        ([{"CPU": 2.0}, {"CPU": 9.0}, {}], None, [("n0", 2, None, 2), ("n1", 4, None, 4), ("n1", 4, None, 4)]),
    ],
    ids=["GPUs", "cuda", "cpu", "cores"],
)
def test_a_worker_for_every_gpu_or_every_four_cores(machines, kind, shares):
    found = RayCrew(None, kind).shares(cluster(*machines))
    assert [(one.node, one.reserved["num_cpus"], one.place.device, one.place.threads) for one in found] == shares


@pytest.mark.parametrize(
    ("kind", "message"), [("cuda", "no machine of the Ray cluster has a GPU"), ("cpu", "has a core for Ray")]
)
def test_a_cluster_that_has_none_is_refused(kind, message):
    with pytest.raises(InputError, match=message):
        RayCrew(None, kind).shares(cluster({}))
