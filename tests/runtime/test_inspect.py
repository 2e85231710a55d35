from types import SimpleNamespace

import pytest
from numpy_engines import SIGNATURES, make_program

from cachec.runtime.bundle import Artifact, Target
from cachec.runtime.inspect import describe_bundle, describe_levels, describe_memory, schedule_strip
from cachec.runtime.program import UNCACHED

ENGINES = {name: Artifact(f"engines/{name}", signature) for name, signature in SIGNATURES.items()}


def make_bundle(cut, **measured):
    target = Target("numpy", "2", "linux", "any", "float32", "3x4", ENGINES, {"sm": [90], "driver": 13}, {"batch": (1, 2, 5)})
    manifest = SimpleNamespace(
        model={"name": "toy", "source": "tests", "weights_sha256": "a" * 64},
        method={"name": "line", "options": {"order": 1}, "fold": "static", "cut": cut, "predictor": None},
        settings={"width": 4, "height": 3, "text_tokens": 0, "guidance": 1.0, "steps": 8, "cut": "blocks.2"},
        programs={"default": {}, UNCACHED: {}},
        targets=(target,),
        files={f"engines/{name}": {"bytes": 2_000_000} for name in ENGINES},
        facts={
            "memory": {"weights": 3_000_000, "activations": 1_000_000},
            "hoisted": {"compute": {"nodes": 7, "flops": 2e6, "weight_bytes": 1e6}},
            "levels": {"default": measured} if measured else {},
        },
    )
    programs = {"default": make_program(cut), UNCACHED: make_program(UNCACHED)}
    return SimpleNamespace(manifest=manifest, target=target, program=programs.__getitem__)


def test_schedules_are_drawn_a_character_a_step():
    assert schedule_strip(make_program("hidden")) == "#·##··#·"
    assert schedule_strip(make_program(UNCACHED)) == "########"


@pytest.mark.parametrize(("cut", "slots"), [("hidden", 2), ("output", 4)])
def test_levels_and_memory(cut, slots):
    rows = describe_levels(make_bundle(cut))
    assert rows[:3] == [("level default", "computes 4 of 8 steps"), ("", "#·##··#·"), ("", "0, 2, 3, 6")]
    assert rows[3][1] == f"{slots} slots of float32, 0.00 MB a sample"
    *_, (name, text) = describe_memory(make_bundle(cut))
    assert name == "memory"
    assert text.startswith("4.0 MB for one sample at level default: weights 3.00 + slots 0.00 + step values 0.00 + activations")


def test_a_bundle_in_words():
    rows = describe_bundle(make_bundle("hidden"), ["fits this machine"])
    text = "\n".join(f"{name}: {value}" for name, value in rows)
    for part in (
        "model: toy (tests), weights aaaaaaaaaaaaaaaa",
        "method: line (order=1), fold static",
        "setting: 4x3, 0 text tokens",
        ": fits this machine\n: sizes batch 1 to 5\n: needs driver 13",
        "  compute: engines/compute, 2.00 MB",
        "hoisted, compute: 7 nodes, 2.00 MFLOP, 1.00 MB of weights left the step",
        "size: 8.0 MB in 4 files",
    ):
        assert part in text
