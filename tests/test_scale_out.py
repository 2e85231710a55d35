"""Workers from the command line, on tiny-flux: results are those of one process."""

import json

import numpy as np
import pytest
from toy_product import run_cli, succeed

from cachec.compiler.calibration.statistics import ARRAYS, load_statistics
from cachec.runtime.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "stats"
    succeed("calibrate", "tiny-flux", "--steps", "2", "--num", "8", "-o", out)
    return load_statistics(out)


def test_calibration_on_ray(tmp_path, alone):
    succeed("calibrate", "tiny-flux", "--steps", "2", "--num", "8", "-o", tmp_path / "stats", "--workers", "ray")
    made = load_statistics(tmp_path / "stats")
    assert made.facts == alone.facts
    for name in ARRAYS:
        if getattr(alone, name) is not None:
            np.testing.assert_allclose(getattr(made, name), getattr(alone, name), rtol=1e-6, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_evaluation_in_processes(tmp_path):
    succeed("compile", "tiny-flux", "--method", "taylor", "--steps", "4", "--interval", "2", "-o", tmp_path / "b")
    for name, way in (("alone", []), ("both", ["--devices", "cpu"])):
        succeed("eval", tmp_path / "b", "--num", "2", "--against", "plain", "--json", tmp_path / name, *way)
    alone, both = (json.loads((tmp_path / name).read_text()) for name in ("alone", "both"))
    assert both["setting"] == alone["setting"]
    for row, other in zip(alone["rows"], both["rows"], strict=True):
        assert other["name"] == row["name"]
        for key in ("psnr_db_by_prompt", "latent_error", "ssim"):
            np.testing.assert_allclose(np.array(other[key], float), np.array(row[key], float), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "b", "both"]


def test_a_cluster_that_is_not_there(tmp_path):
    code, output = run_cli("calibrate", "tiny-flux", "-o", tmp_path / "stats", "--workers", "ray:127.0.0.1:9")
    assert code == InputError.exit_code
    assert "no Ray cluster answers at 127.0.0.1:9" in output
