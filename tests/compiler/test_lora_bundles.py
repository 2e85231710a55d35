"""Bundles with LoRAs: fused when they are compiled, or added as further weights; beside the pipeline with the sums by hand."""

import shutil
from dataclasses import replace

import pytest
import torch
from lora_files import RANK, fuse, linears, pairs, write_lora

import cachec
from cachec.compiler.commands.add_weights import add_weights, check_bundle
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError, OutputError
from cachec.runtime.inspect import describe_bundle
from tests.families import FAMILIES
from tests.toy_product import run_cli, succeed

FLUX = next(family for family in FAMILIES if family.name == "flux")
SCALE, ALPHA = 0.5, 2
OPTIONS = {
    "method": "reuse",
    "schedule": "0,2",
    "steps": FLUX.call["num_inference_steps"],
    "height": FLUX.call["height"],
    "width": FLUX.call["width"],
    "text_tokens": FLUX.call["max_sequence_length"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(saved_family):
    return saved_family("flux")


@pytest.fixture(scope="module")
def made(directory):
    """The matrices, by layer: a few layers of a block, and of what the prologue is made of."""
    transformer = FLUX.load(directory).transformer
    return pairs(transformer, linears(transformer))


@pytest.fixture(scope="module")
def lora(made, tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", made, alpha=ALPHA)


@pytest.fixture(scope="module")
def fused(directory, lora, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "fused.cachec"
    return cachec.compile_model(str(directory), out, targets="eager", lora=f"{lora}:{SCALE}", **OPTIONS)


@pytest.fixture(scope="module")
def added(directory, lora, tmp_path_factory):
    """A bundle of the plain model, to which the weights ``style`` were added."""
    out = tmp_path_factory.mktemp("added") / "a.cachec"
    cachec.compile_model(str(directory), out, targets=("ort", "eager"), **OPTIONS)
    assert "weights style" in succeed("add-weights", out, "--lora", f"{lora}:{SCALE}")
    return out


@pytest.fixture
def pipeline(directory, made):
    """``pipeline(scale)``: the pipeline with the LoRA fused by hand."""

    def make(scale=SCALE * ALPHA / RANK):
        found = FLUX.load(directory)
        fuse(found.transformer, made, scale)
        return found

    return make


def standing(pipeline, loaded):
    pipeline.transformer = loaded.as_transformer(pipeline.transformer, pipeline=pipeline, level="uncached")
    return pipeline


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_a_bundle_with_a_lora_is_the_pipeline_with_it(fused, pipeline, lora):
    wanted = FLUX.run(pipeline())
    assert error(FLUX.run(pipeline(0.0)), wanted) > 1e-3
    assert error(FLUX.run(standing(pipeline(), cachec.load(fused))), wanted) < 1e-5
    manifest = Bundle.open(fused).manifest
    (told,) = manifest.model["loras"]
    assert (told["name"], told["scale"]) == ("style.safetensors", SCALE)
    assert manifest.model["weights_sha256"] != manifest.model["plain_sha256"]
    assert ("lora", f"style.safetensors at scale 0.5, {told['sha256'][:16]}") in describe_bundle(Bundle.open(fused))


def test_each_back_end_takes_added_weights(added, pipeline):
    wanted, plain = FLUX.run(pipeline()), FLUX.run(pipeline(0.0))
    for target in ("ort", "eager"):
        loaded = cachec.load(added, target=target, weights="style")
        assert error(FLUX.run(standing(pipeline(), loaded)), wanted) < 1e-5
        assert error(FLUX.run(standing(pipeline(0.0), cachec.load(added, target=target))), plain) < 1e-5


def test_only_changed_tensors_are_written(added):
    """And each once, for all back ends."""
    manifest = Bundle.open(added).manifest
    own = manifest.weights["style"]
    sizes = {name: entry["bytes"] for name, entry in manifest.files.items() if name.endswith(".bin")}
    size = sizes.pop(own["file"])
    assert 0.2 * sum(sizes.values()) < size < 0.7 * sum(sizes.values())
    for target in manifest.targets:
        changed = {*target.added["style"]}
        assert changed == {"prologue", "compute"}  # no layer of the forecast is
    rows = dict(describe_bundle(Bundle.open(added)))
    assert rows["weights style"].startswith("style.safetensors at scale 0.5")
    text = " ".join(text for _, text in describe_bundle(Bundle.open(added)))
    assert "for ort, eager; levels were fitted and measured on the bundle's own weights" in text


def test_a_pipeline_with_another_mix_is_refused(added, pipeline):
    loaded = cachec.load(added, weights="style")
    with pytest.raises(InputError, match=r"with style.safetensors at scale 0.5, .*: its weights have 0.00 of what the LoRA"):
        standing(pipeline(0.0), loaded)
    with pytest.raises(InputError, match=r"have 2.00 of what .* Load the same with pipe.load_lora_weights\('style.safet"):
        standing(pipeline(2 * SCALE * ALPHA / RANK), loaded)
    with pytest.raises(InputError, match="has other values. Take the adapter off, .*, or load the bundle with weights='style'"):
        standing(pipeline(), cachec.load(added))


class Layer(torch.nn.Module):
    """PEFT's layer, as far as it is looked at; ``peft`` itself need not be installed."""

    use_dora, merged_adapters, disable_adapters, active_adapters = {"a": False}, (), False, ["a"]

    def __init__(self, base_layer, up, down):
        super().__init__()
        self.base_layer, self.scaling = base_layer, {"a": SCALE * ALPHA / RANK}
        sides = {"lora_A": down, "lora_B": up}
        for name, value in sides.items():
            linear = torch.nn.Linear(*value.T.shape, bias=False)
            linear.weight.data = value
            setattr(self, name, torch.nn.ModuleDict({"a": linear}))


def with_loaded_lora(pipeline, made):
    for name, (up, down) in made.items():
        parent, _, last = name.rpartition(".")
        owner = pipeline.transformer.get_submodule(parent)
        setattr(owner, last, Layer(getattr(owner, last), up, down))
    return pipeline


def test_a_lora_that_is_loaded_and_not_fused_is_counted(added, pipeline, made):
    held = with_loaded_lora(pipeline(0.0), made)
    again = standing(with_loaded_lora(pipeline(0.0), made), cachec.load(added, weights="style"))
    assert error(FLUX.run(again), FLUX.run(pipeline())) < 1e-5
    with pytest.raises(InputError, match=r"Take the LoRA off, or compile with it: cachec compile .* --lora FILE"):
        cachec.load(added).as_transformer(held.transformer)
    with pytest.raises(InputError, match=r"has a LoRA beside its weights: fuse it with pipe.fuse_lora\(\), then call"):
        cachec.accelerate(held, **OPTIONS)
    with pytest.raises(InputError, match="lora cannot be given: fuse it in the pipeline first"):
        cachec.accelerate(held, lora="style.safetensors")


def test_what_cannot_be_added(added, lora, pipeline, tmp_path):
    pipeline(0.3).save_pretrained(tmp_path / "other")

    def refused(kind, message, loras=(lora,), **options):
        with pytest.raises(kind, match=message) as found:
            add_weights(added, [str(one) for one in loras], **options)
        assert "\n" not in str(found.value)

    refused(OutputError, "has weights style already: pass --force to replace them, or another --name")
    refused(InputError, "weights 'a b' is not a name", name="a b")
    refused(InputError, "nothing is asked for: give --lora FILE", loras=())
    refused(InputError, "has other weights than the bundle was compiled from", name="x", source=str(tmp_path / "other"))
    manifest = Bundle.open(added).manifest
    for changes, message in (
        (
            {"model": {**manifest.model, "loras": [{"name": "a.safetensors"}]}},
            "was compiled with a.safetensors fused: compile it",
        ),
        ({"method": {**manifest.method, "fold": "none"}}, "was compiled with --fold none, so its graphs have a predictor"),
        ({"targets": [replace(manifest.targets[0], backend="ort-tensorrt")]}, "ort-tensorrt .* takes no other weights"),
    ):
        with pytest.raises(InputError, match=message):
            check_bundle(added, replace(manifest, **changes), "x", force=False)
    before = sorted(path for path in added.rglob("*"))
    refused(InputError, "unknown model", name="x", source="none")
    assert sorted(path for path in added.rglob("*")) == before


def test_the_command_line(added, lora, tmp_path):
    code, text = run_cli("add-weights", added, "--lora", f"{lora}:no")
    assert (code, text.count("\n")) == (3, 1)
    assert "the scale 'no' must be a number other than 0" in text
    picture = tmp_path / "a.png"
    assert str(picture) in succeed("run", added, "-p", "a ring", "-o", picture, "--weights", "style")


def test_weights_are_replaced_by_those_of_another_mix(added, lora, directory, tmp_path):
    bundle = shutil.copytree(added, tmp_path / "a.cachec")
    before = {path.name for path in bundle.rglob("*") if path.is_file()}
    succeed("add-weights", bundle, "--lora", f"{lora}:3", "--name", "style", "--force", "--model", directory)
    after = {path.name for path in bundle.rglob("*") if path.is_file()}
    assert len(after) == len(before)
    assert len(after - before) == 6  # weights, samples, and for two graphs an ONNX file and one of constants
    assert Bundle.open(bundle, verify=True).manifest.weights["style"]["loras"][0]["scale"] == 3
