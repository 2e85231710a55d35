"""What a manifest says of the request that it was made for."""

import json
from dataclasses import replace

from toy_model import ToyModel

from cachec.compiler.manifest import make_manifest
from cachec.compiler.request import make_request
from cachec.runtime.write import BundleWriter


def made(tmp_path, model, **given):
    request = make_request(model.spec, method="taylor", steps=8, interval=3, targets="eager", **given)
    with BundleWriter(tmp_path / "out", force=False) as writer:
        writer.add_bytes("notes.txt", b"kept")
        return make_manifest(model, request, writer, (), {}, None, {}, {"levels": {"default": {}}}), dict(writer.files)


def test_it_says_what_was_asked_for_and_what_was_measured(tmp_path):
    manifest, files = made(tmp_path, ToyModel(), options={"order": "2"}, seed=7)
    assert manifest.model == {"name": "toy", "source": "tests", "weights_sha256": "a" * 64}
    assert (manifest.method["name"], manifest.method["options"]["order"], manifest.method["fold"]) == ("taylor", 2, "static")
    assert manifest.method["predictor"] is None
    assert {key: manifest.settings[key] for key in ("steps", "interval", "seed", "block", "prompts")} == {
        "steps": 8, "interval": 3, "seed": 7, "block": "blocks.2", "prompts": "avatars",
    }  # fmt: skip
    assert manifest.files == files
    assert manifest.facts["levels"] == {"default": {}}
    assert manifest.facts["made_by"].startswith("cachec ")
    json.dumps(manifest.to_json())


def test_a_packaged_model_is_named_without_its_place_on_this_machine(tmp_path):
    spec = replace(ToyModel.spec, source=str(tmp_path), packaged=True)
    manifest, _ = made(tmp_path, ToyModel(spec=spec), fold="none")
    assert str(tmp_path) not in json.dumps(manifest.to_json())
    assert manifest.method["fold"] == "none"


def test_it_says_what_is_fused(tmp_path):
    class Fused(ToyModel):
        plain_hash, loras = "p" * 64, ({"name": "a.safetensors", "sha256": "c" * 64, "scale": 0.5},)

    model = made(tmp_path, Fused())[0].model
    assert (model["plain_sha256"], model["loras"]) == ("p" * 64, [dict(Fused.loras[0])])
