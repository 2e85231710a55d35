"""A whole compilation: how often it captures, and what it leaves. One below its gate leaves nothing: ``test_gram_toy.py``."""

import pytest
from toy_model import ToyModel

from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a ring of size {size}" for size in range(24)))
    return path


def test_one_compilation_captures_once_whatever_it_needs(tmp_path, prompts, captures):
    """It is trained, calibrated and measured in float32, and built in bfloat16."""
    wanted = {"method": "lesa", "options": {"max_rounds": "1"}, "steps": 8, "interval": 3, "dtype": "bfloat16"}
    request = make_request(ToyModel.spec, **wanted, targets="eager", prompts=prompts, min_psnr=1.0)
    result = compile_bundle(ToyModel(), request, tmp_path / "out")
    assert len(captures) == 1
    assert result.predictor_origin == "trained now"
    assert result.bundle.manifest.facts["levels"]["default"]["psnr_db"] > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "prompts.txt"]
