from dataclasses import replace
from types import SimpleNamespace

import pytest
from numpy_engines import SIGNATURES, make_program

from cachec.runtime.bundle import Artifact, Manifest, Target
from cachec.runtime.inspect import describe_bundle, describe_levels, describe_memory, schedule_strip
from cachec.runtime.program import UNCACHED
from cachec.runtime.variants import Variant

ENGINES = {name: Artifact(f"engines/{name}", signature) for name, signature in SIGNATURES.items()}


def make_bundle(cut, **measured):
    target = Target(
        "numpy",
        "2",
        "linux",
        "any",
        "float32",
        "4x3",
        ENGINES,
        {"sm": [90], "driver": 13},
        {"batch": (1, 2, 5), "rows": (2, 3, 4)},
    )
    manifest = Manifest(
        io={},
        noise="numpy",
        model={"name": "toy", "source": "tests", "weights_sha256": "a" * 64},
        method={"name": "line", "options": {"order": 1}, "fold": "static", "cut": cut, "predictor": None},
        settings={"width": 4, "height": 3, "text_tokens": 0, "guidance": 1.0, "steps": 8, "block": "blocks.2"},
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
    return opened(manifest, programs)


def opened(manifest, programs):
    """What ``Bundle.open`` gives, without files."""
    return SimpleNamespace(
        manifest=manifest,
        target=manifest.targets[0],
        program=programs.__getitem__,
        at=lambda *given: opened(manifest.at(*given), programs),
    )


def with_sizes(bundle):
    """The same bundle, with another size and another number of steps."""
    manifest, target, programs = bundle.manifest, bundle.target, bundle.manifest.programs
    own = {**manifest.settings}
    more = tuple(Variant({**own, **other}, programs, {}) for other in ({"steps": 9}, {"width": 5}, {"width": 5, "steps": 9}))
    targets = (target, replace(target, shape_bucket="5x3"))
    return opened(replace(manifest, targets=targets, more=more), {"default": make_program("hidden")})


def test_schedules_are_drawn_a_character_a_step():
    assert schedule_strip(make_program("hidden")) == "#·##··#·"
    assert schedule_strip(make_program(UNCACHED)) == "########"


@pytest.mark.parametrize(("cut", "slots", "kind"), [("hidden", 2, "feature"), ("output", 4, "velocity")])
def test_levels_and_memory(cut, slots, kind):
    rows = describe_levels(make_bundle(cut))
    assert rows[:3] == [("level default", "computes 4 of 8 steps"), ("", "#·##··#·"), ("", "0, 2, 3, 6")]
    assert rows[3][1] == f"{slots} {kind} slots of float32, 0.00 MB a sample"
    *_, (name, text) = describe_memory(make_bundle(cut))
    assert name == "memory"
    assert text.startswith("4.0 MB for one sample at level default: weights 3.00 + slots 0.00 + step values 0.00 + activations")


def test_memory_is_counted_in_bytes():
    """Slots and step values of a toy are too small to show: here they have a thousand times the rows and columns."""
    bundle = make_bundle("hidden")

    def wide(specs):
        return tuple(replace(spec, shape=tuple(d if isinstance(d, str) else 1000 * d for d in spec.shape)) for spec in specs)

    bundle.target = replace(bundle.target, engines={
        name: Artifact(one.path, replace(one.signature, outputs=wide(one.signature.outputs))) for name, one in ENGINES.items()
    })  # fmt: skip
    *_, (_, text) = describe_memory(bundle)
    sizes = "weights 3.00 + slots 96.00 + step values 0.13 + activations at most 1.00"
    assert text == f"100.1 MB for one sample at level default: {sizes}"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"psnr_db": None}, "PSNR equal, loop 1.50 times as fast; 4 held-out prompts, by ort"),
        ({"psnr_db": 30.123, "psnr_db_stderr": 0.5}, "PSNR 30.12 dB ± 0.50, loop 1.50 times as fast; 4 held"),
        ({"psnr_db": 30, "psnr_db_fine": 20}, "PSNR 30.00 dB, loop 1.50 times as fast, 20.00 dB against the fine reference; 4"),
        ({"latent_error": 0.0123}, "latents off by 1.23 %, loop 1.50 times as fast; 4 held-out prompts, by ort"),
    ],
)
def test_what_was_measured_is_said(facts, said):
    rows = describe_levels(make_bundle("hidden", **facts, speedup=1.5, num_prompts=4, measured_by="ort"))
    assert rows[-1][0] == ""
    assert rows[-1][1].startswith(said)


def test_a_bundle_in_words():
    rows = describe_bundle(make_bundle("hidden"), ["fits this machine"])
    text = "\n".join(f"{name}: {value}" for name, value in rows)
    for part in (
        "model: toy (tests), weights aaaaaaaaaaaaaaaa",
        "method: line (order=1), fold static",
        "setting: 4x3, 0 text tokens",
        ": fits this machine\n: sizes batch 1 to 5, rows 2 to 4\n: needs driver 13",
        "  compute: engines/compute, 2.00 MB",
        "hoisted, compute: 7 nodes, 2.00 MFLOP, 1.00 MB of weights left the step",
        "size: 8.0 MB in 4 files",
    ):
        assert part in text


def test_all_sizes_and_step_counts_are_listed():
    rows = describe_bundle(with_sizes(make_bundle("hidden")))
    assert [row for row in rows if row[0] in ("sizes", "step counts")] == [("sizes", "4x3, 5x3"), ("step counts", "8, 9")]
    assert [text for name, text in rows if name == "at"] == [
        "4x3, 8 steps",
        "4x3, 9 steps",
        "5x3, 8 steps",
        "5x3, 9 steps",
        "5x3",
    ]
    assert [name for name, _ in rows].count("level default") == 4
    assert [name for name, _ in rows].count("memory") == 2
