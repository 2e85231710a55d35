"""cachec import, and what it makes of the text file that L2P released."""

import json

import numpy as np
import pytest
from toy_product import run_cli, succeed

from cachec.compiler.methods.l2p import L2p, read_rows
from cachec.compiler.methods.released import load_given
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import PredictorError

ROWS = np.tril(np.random.default_rng(0).standard_normal((6, 6)))


@pytest.fixture
def released(tmp_path):
    path = tmp_path / "weight.txt"
    path.write_text(json.dumps(ROWS.tolist()) + "\n")
    return path


def test_released_rows_of_l2p_are_imported_with_their_licence(released, tmp_path):
    said = succeed("import", "l2p", released, "-o", tmp_path / "l2p.safetensors")
    assert "FLUX.1-dev Non-Commercial" in said
    assert "weight.txt (sha256 " in said
    parameters = load_given(tmp_path / "l2p.safetensors", "l2p", 6)
    assert parameters.facts["license"].startswith("FLUX.1-dev Non-Commercial")
    sigmas, velocities = np.linspace(1, 0, 7), np.random.default_rng(1).standard_normal((6, 3))
    schedule, x, history = Schedule(6, (0, 1, 4)), np.zeros(3), []
    table = L2p().table(schedule, sigmas, parameters)
    for step in range(6):  # the released loop: the row of the last step so far weighs the whole history
        history.append(velocities[step] if step in schedule.compute else ROWS[len(history) - 1, : len(history)] @ history)
        x = x + (sigmas[step + 1] - sigmas[step]) * history[-1]
    np.testing.assert_allclose(table.coefficients[-1] @ velocities[[0, 1, 4]], x, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "is no list of lists of numbers"),
        ("[[1.0, 0.0], [1.0]]", "does not read as a list of lists of numbers: .*its rows have 1 to 2 numbers"),
        ("[[1.0, 0.0]", "does not read as a list of lists"),
        ("[[1.0, 2.0], [1.0, 1.0]]", "a row weighs a step that is not before its own"),
        ("[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]", r"numbers of shape \[2, 3\]"),
        (f"[[{'1' * 400}, 0], [0, 1]]", "does not read as a list of lists"),
        ("[" * 100000, "does not read as a list of lists"),
        ("[[1e999, 0], [0, 1]]", r"numbers of shape"),
    ],
)
def test_anything_else_is_refused_and_never_evaluated(tmp_path, text, message):
    (tmp_path / "w.txt").write_text(text)
    with pytest.raises(PredictorError, match=message):
        read_rows(tmp_path / "w.txt")


def test_methods_without_released_weights_and_other_options_are_refused(released, tmp_path):
    code, said = run_cli("import", "taylor", released, "-o", tmp_path / "x")
    assert code != 0
    assert "no weights of taylor are known to be released: cachec import reads those of" in said
    code, said = run_cli("import", "l2p", released, "-o", tmp_path / "x", "--set", "steps=3")
    assert code != 0
    assert "steps" in said
    code, said = run_cli("import", "l2p", released, released, "-o", tmp_path / "x")
    assert "l2p is released as one file, and 2 are given" in said
    assert not (tmp_path / "x").exists()


def test_a_bundle_of_imported_rows_needs_no_calibration_and_keeps_the_licence(released, tmp_path, toy_directory):
    succeed("import", "l2p", released, "-o", tmp_path / "l2p.safetensors")
    given = ["--method", "l2p", "--predictor", tmp_path / "l2p.safetensors", "--steps", "6", "--schedule", "0,1,4"]
    succeed("compile", toy_directory, *given, "--target", "eager", "-o", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.method["predictor"]["license"].startswith("FLUX.1-dev Non-Commercial")
    assert bundle.program("default").compute_steps == (0, 1, 4)
    assert bundle.manifest.facts["calibration"] == {}
    code, said = run_cli("compile", toy_directory, *given[:4], "--steps", "8", "--target", "eager", "-o", tmp_path / "other")
    assert code != 0
    assert "steps is 6, wanted 8" in said
