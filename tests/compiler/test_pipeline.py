"""A whole compilation: how often it captures, and what it leaves. One below its gate leaves nothing: ``test_gram_toy.py``."""

import pytest
from toy_model import ToyModel

from cachec.compiler.models import find_model, load_model
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.engines import onnx_files, onnx_weights
from cachec.runtime.bundle import Bundle


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


def test_a_compilation_that_was_interrupted_in_the_weights_goes_on_there(tmp_path, toy_directory, monkeypatch, caplog):
    monkeypatch.setattr(onnx_files, "SHARED_FROM", 64)  # bytes: else nearly all of the toy is in the graphs
    model, written, stop_at = load_model(find_model(str(toy_directory))), [], 9
    request = make_request(model.spec, method="adams", steps=4, schedule="0,2")
    contents = onnx_weights.contents

    def counted(tensor):
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(tensor)
        yield from contents(tensor)

    monkeypatch.setattr(onnx_weights, "contents", counted)
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(model, request, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.weights"]
    before, stop_at = len(written), None
    compile_bundle(model, request, tmp_path / "out")
    together = len(written)
    assert "continues: " in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    whole = compile_bundle(model, request, tmp_path / "whole").bundle.manifest.files
    assert together == len(written) - together > before == 9  # nothing was written twice
    assert Bundle.open(tmp_path / "out").manifest.files == whole


@pytest.mark.parametrize(
    ("options", "first"), [({"method": "adams", "schedule": "0,2"}, 1), ({"method": "lesa", "interval": 2, "steps": 8}, 2)]
)
def test_the_plan_is_said_before_anything_is_trained(tmp_path, toy_directory, monkeypatch, caplog, options, first):
    def trained(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cachec.compiler.frontend.train_predictor", trained)
    monkeypatch.setattr("cachec.compiler.pipeline.make_plans", trained)
    model = load_model(find_model(str(toy_directory)))
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(model, make_request(model.spec, **{"steps": 4, **options}), tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said[0].startswith("plan: 0.00 million parameters, ")
    assert "compiling takes 1.70 GB of memory and " in said[0]
    assert len(said) == first
