"""Timing back ends against each other: who is compared, how often engines are called, what is dropped."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachec.engines import fastest
from cachec.engines.add_target import BundledSources
from cachec.engines.fastest import count_calls, find_usable, keep_fastest
from cachec.engines.targets import TargetName
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.device import DeviceName, Host
from cachec.runtime.engine import HOST
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.sizes import size_ranges
from cachec.runtime.specs import Signature, TensorSpec
from cachec.runtime.write import BundleAdder

SIZES = size_ranges(50, 10)
NAMES = tuple(map(TargetName, "abcd"))


def test_a_request_calls_what_its_cut_has():
    assert count_calls(["prologue", "compute", "forecast", "advance"], SIZES) == {
        "prologue": 1, "compute": 10, "forecast": 10, "advance": 0,
    }  # fmt: skip
    assert count_calls(["compute", "advance"], SIZES) == {"compute": 10, "advance": 10}
    assert count_calls(["compute", "forecast"], size_ranges(8, 8))["forecast"] == 0


class Calls:
    """Calls that take so many seconds, as if; each is heard."""

    def __init__(self, name, seconds, heard):
        self.name, self.seconds, self.heard = name, seconds, heard

    def timed(self):
        self.heard.append(self.name)
        return {"compute": self.seconds * (1 + len(self.heard) / 1e6)}


@pytest.fixture
def race(monkeypatch):
    """``race(a=2.0, b=…)`` lets back ends take so many seconds; ``alone`` have no room beside another."""

    def run(*, alone=(), **seconds):
        heard, there, dropped = [], set(), []

        class Contender(fastest._Contender):
            def load(self):
                name = str(self.name)
                if alone and there - {name}:
                    raise InputError("cpu has no room")
                there.add(name)
                return Calls(name, seconds[name], heard)

            def close(self):
                there.discard(str(self.name))

        def build(name, sources, writer, device, options):
            if str(name) not in seconds:
                raise ValueError("it cannot")
            return Contender(name, SimpleNamespace(version="1", name=str(name)), 0.0, sources, writer, device, SIZES)

        monkeypatch.setattr(fastest, "_build", build)
        monkeypatch.setattr(fastest, "_drop", lambda writer, name, sources: dropped.append(str(name)))
        monkeypatch.setattr(fastest, "PAUSE", 0.0)
        monkeypatch.setattr(fastest, "ROUNDS", (3, 3))
        target, facts = keep_fastest(NAMES, None, None, HOST, DEFAULTS, {})
        assert not there
        return target.name, facts, dropped, heard

    return run


@pytest.mark.parametrize("alone", [False, True])
def test_ratios_are_to_the_kept_one_through_all_comparisons(race, alone):
    kept, facts, dropped, heard = race(a=2.0, b=1.0, c=4.0, d=0.5, alone=alone)
    assert (kept, facts["kept"], dropped) == ("d", "d", ["a", "c", "b"])
    ratios = {name: row["ratio"] for name, row in facts["targets"].items()}
    assert ratios == pytest.approx({"d": 1.0, "b": 2.0, "a": 4.0, "c": 8.0}, rel=1e-3)
    assert list(ratios) == ["d", "b", "a", "c"]
    assert facts["targets"]["d"]["request_seconds"] == pytest.approx(5.0, rel=1e-3)
    assert facts["targets"]["c"]["beside"] == {"name": "b", "request_seconds": pytest.approx(10.0, rel=1e-3)}
    turns = heard[3:9]  # of a and b
    assert (sorted(turns) == turns or sorted(turns, reverse=True) == turns) == alone


def test_what_fails_is_said_and_dropped(race, caplog):
    kept, facts, dropped, _ = race(b=1.0, d=2.0)
    assert (kept, dropped, facts["failed"]) == ("b", ["a", "c", "d"], {"a": "it cannot", "c": "it cannot"})
    assert "a is left out: it cannot" in caplog.text


def test_back_ends_that_cannot_run_here_are_known_before_anything_is_built():
    names = [TargetName(name) for name in ("ort", "tensorrt")]
    usable, failed = find_usable(names, ["float32"], HOST, DEFAULTS)
    assert usable == (TargetName("ort"),)
    assert failed.keys() == {"tensorrt"}
    with pytest.raises(InputError, match="no back end can be built and run on cpu here:\n  ort: bfloat16"):
        find_usable(names[:1], ["float32", "bfloat16"], HOST, DEFAULTS)
    with pytest.raises(InputError, match="workspace is for none of the targets ort"):
        find_usable(names, ["float32"], HOST, BuildOptions(workspace=1))


class Recording(Host):
    """Records calls, or cannot."""

    def __init__(self, recorded):
        self.recorded = recorded

    def record(self, work):
        if self.recorded is None:
            raise EngineError("they cannot be captured")
        return SimpleNamespace(run=lambda: (self.recorded.append(1), work()))


@pytest.mark.parametrize("recorded", [None, []])
def test_quick_calls_are_warmed_up_and_recorded_and_inputs_have_their_sizes(recorded):
    runs = count()

    class Context:
        scratch = None

        def scratch_bytes(self, shapes):
            assert shapes == {"x": (1, 10, 3), "n": ()}
            return 7

        def bind(self, inputs, outputs):
            assert self.scratch.shape == (7,)
            assert 0 <= inputs["x"].min() < inputs["x"].max() <= 1
            assert outputs["y"].shape == (1,)
            return SimpleNamespace(run=lambda: next(runs))

    inputs = (TensorSpec("x", ("batch", "slots", 3), "float16"), TensorSpec("n", (), "int64"))
    signature = Signature(inputs, (TensorSpec("y", ("batch",), "float32"),))
    engine = SimpleNamespace(device=Recording(recorded), signature=signature, context=lambda device: Context())
    calls = fastest._Calls({"compute": engine}, SIZES)
    before = next(runs)
    calls.timed()
    assert next(runs) - before == 3
    assert recorded in (None, [1, 1])


def test_tensorrt_is_timed_on_its_gpu_from_recordings(bundle, trt, cuda, monkeypatch):
    monkeypatch.setattr(
        "cachec.engines.build_target.build_apart", lambda builder, *given, **more: builder.build(*given, **more)
    )
    options = BuildOptions(sizes=size_ranges(8, 4))
    with BundleAdder(bundle) as writer:
        sources = BundledSources(writer.bundle)
        target, facts = keep_fastest([TargetName("tensorrt")], sources, writer, DeviceName("cuda"), options, {})
        assert {path.name for path in (writer.staging / "engines").rglob("*.plan")} == {
            Path(artifact.path).name for artifact in target.engines.values()
        }
    assert facts["targets"]["tensorrt"]["seconds"].keys() == target.engines.keys()
    assert facts["device"] == "cuda:0"
    assert cuda.names().count("cudaGraphLaunch") >= 5 * len(target.engines)
