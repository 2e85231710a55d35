"""LoRA files: what is read of them, what they make of weights, and what is refused before anything slow."""

import json

import pytest
import torch
from lora_files import RANK, pairs, write_lora
from safetensors.torch import save_file

from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.lora_files import LoraFile, parse_loras
from cachec.runtime.errors import InputError
from tests.families import FAMILIES

FLUX = next(family for family in FAMILIES if family.name == "flux")
LAYERS = ("proj_out", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")


@pytest.fixture(scope="module")
def directory(saved_family):
    return str(saved_family("flux"))


@pytest.fixture(scope="module")
def plain(directory):
    return load_model(find_model(directory)).transformer


@pytest.fixture(scope="module")
def made(plain):
    return pairs(plain, LAYERS)


def fused(directory, *texts):
    return load_model(find_model(directory), loras=parse_loras([str(text) for text in texts]))


def check(model, plain, wanted):
    """The weights as they are named, and as they are loaded, are the plain ones with ``wanted`` [(matrices, scale)]."""
    held = {name: value.clone() for name, value in plain.state_dict().items()}
    for made, scale in wanted:
        for name, (up, down) in made.items():
            held[f"{name}.weight"] += scale * up @ down
    loaded = model.transformer.state_dict()
    for name, value in held.items():
        torch.testing.assert_close(loaded[name], value)
        assert torch.equal(model.stored.shards.read(name), loaded[name])
    assert {*model.stored.shards.updates} == {f"{name}.weight" for made, _ in wanted for name in made}


def test_files_of_diffusers(directory, plain, made, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", made, alpha=2)
    other = pairs(plain, LAYERS[:1], seed=1)
    second = write_lora(tmp_path / "b.safetensors", other)
    model = fused(directory, f"{file}:0.5", second)
    check(model, plain, [(made, 0.5 * 2 / RANK), (other, 1.0)])
    assert [(one["name"], one["scale"]) for one in model.loras] == [("a.safetensors", 0.5), ("b.safetensors", 1.0)]
    hashes = {fused(directory, *texts).weights_hash for texts in ([], [file], [f"{file}:0.5"], [file, second])}
    assert len(hashes | {model.weights_hash}) == 5
    assert model.plain_hash == load_model(find_model(directory)).weights_hash


def test_what_the_metadata_says_of_the_scale(directory, plain, made, tmp_path):
    says = {"r": RANK, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"proj_out": 2}}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in says.items()})}
    write_lora(tmp_path / "a.safetensors", made, metadata=metadata)
    rest, first = dict(list(made.items())[1:]), {LAYERS[0]: made[LAYERS[0]]}
    check(fused(directory, tmp_path / "a.safetensors"), plain, [(rest, 4.0), (first, 1.0)])


def test_files_of_peft(directory, plain, made, tmp_path):
    write_lora(tmp_path / "adapter_model.safetensors", made, prefix="base_model.model.")
    with pytest.raises(InputError, match=r"written by PEFT, which writes its scale to adapter_config.json: put that beside it"):
        fused(directory, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2}))
    check(fused(directory, tmp_path / "adapter_model.safetensors"), plain, [(made, 0.5)])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(InputError, match="is LOHA, by .*adapter_config.json: fuse it with PEFT"):
        fused(directory, tmp_path / "adapter_model.safetensors")


def test_files_of_kohya_are_converted_by_diffusers(directory, plain, tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    width = plain.get_submodule("transformer_blocks.0.attn.to_q").weight.shape[0]
    up, down = (torch.randn(*shape, generator=generator) for shape in ((3 * width, RANK), (RANK, width)))
    head = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{head}.lora_up.weight": up, f"{head}.lora_down.weight": down, f"{head}.alpha": torch.tensor(2.0)}
    encoder = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{side}.weight": torch.ones(4, 4) for side in ("up", "down")}
    save_file({**tensors, **encoder}, tmp_path / "k.safetensors")
    parts = {f"transformer_blocks.0.attn.to_{n}": (one, down) for n, one in zip("qkv", up.split(width), strict=True)}
    check(fused(directory, tmp_path / "k.safetensors"), plain, [(parts, 2 / RANK)])
    assert "2 tensors of text encoders are not used (lora_te1_text_model" in caplog.text


def convolution(made):
    return {"x": (torch.ones(8, RANK, 1, 1), torch.ones(RANK, 4, 2, 2))}


def with_tensor(name):
    return lambda path, made: write_lora(path, made, more={name: torch.ones(3)})


def renamed(path, made):
    return write_lora(path, {name.replace("blocks", "stacks"): pair for name, pair in made.items()})


def wrong_rank(path, made):
    (up, down), name = made["proj_out"], "proj_out"
    return write_lora(path, {**made, name: (up, down[:-1])})


@pytest.mark.parametrize(("write", "message"), [
    (renamed, r"is for other layers than FluxTransformer2DModel has: single_transformer_stacks.1.proj_mlp, transformer_stacks"),
    (wrong_rank, r"proj_out has matrices \[64, 4\] and \[3, 32\], which do not multiply to the weight \[64, 32\]"),
    (with_tensor("transformer.proj_out.dora_scale"), r"holds DoRA, not only pairs of matrices \(transformer.proj_out.dora"),
    (with_tensor("transformer.x.hada_w1_a"), "holds LoHa"),
    (with_tensor("transformer.x.lokr_w1"), "holds LoKr"),
    (with_tensor("transformer.proj_out.lora_B.bias"), r"holds biases \(lora_bias\)"),
    (with_tensor("transformer.proj_out.diff"), "holds whole differences of weights"),
    (with_tensor("transformer.proj_out.weight"), r"is of an unknown format: transformer.proj_out.weight. Save it as"),
    (with_tensor("transformer.x_embedder.lora_A.weight"), "is not whole: x_embedder has not both matrices"),
    (with_tensor("transformer.proj_out.lora_A.other.weight"), "holds several adapters, proj_out twice: save one alone"),
    (lambda path, made: write_lora(path, made, prefix="blocks."), r"not known for FluxPipeline|other layers"),
    (lambda path, made: write_lora(path, made, prefix="text_encoder."), "is for text encoders only"),
    (lambda path, made: write_lora(path, made, metadata={"lora_adapter_metadata": '{"transformer.r": 7}'}),
     "is of rank 4, and the file says 7"),
    (lambda path, made: write_lora(path, made, metadata={"lora_adapter_metadata": '{"transformer.r": "x"}'}),
     "rank and scale cannot be read"),
    (lambda path, made: write_lora(path, made, metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": null}'}),
     "rank and scale cannot be read"),
    (lambda path, made: write_lora(path, {n: (up[:, :0], down[:0]) for n, (up, down) in made.items()}), "do not multiply to"),
    (with_tensor("transformer.proj_out.alpha"), "has more than one alpha for proj_out"),
    (lambda path, made: write_lora(path, {n: (up * torch.nan, down) for n, (up, down) in made.items()}), "holds NaN"),
    (lambda path, made: path.write_bytes(b"no"), "is no safetensors file, or is cut off"),
])  # fmt: skip
def test_files_that_are_refused(directory, made, tmp_path, write, message):
    write(tmp_path / "bad.safetensors", made)
    with pytest.raises(InputError, match=message) as error:
        fused(directory, tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_what_is_asked_for_is_checked_first(tmp_path):
    file = tmp_path / "a.safetensors"
    file.touch()
    (tmp_path / "a.pt").touch()
    assert parse_loras([f"{file}:-0.5"]) == (LoraFile(file, -0.5),)
    for texts, message in (
        ([f"{file}:much"], "the scale 'much' must be a number other than 0"),
        ([f"{file}:nan"], "the scale 'nan' must be"),
        ([f"{file}:0"], "the scale '0' must be"),
        (["none.safetensors"], "lora none.safetensors: there is no such file. Give FILE.safetensors"),
        ([str(tmp_path / "a.pt")], r"is no safetensors file, and what others hold may run code: convert it with python -c"),
        ([str(file), f"{tmp_path}/./a.safetensors:2"], "is given twice: give it once, with the sum of the scales"),
    ):
        with pytest.raises(InputError, match=message):
            parse_loras(texts)


def test_the_same_file_under_two_names_is_refused(directory, made, tmp_path):
    texts = [write_lora(tmp_path / name, made) for name in ("a.safetensors", "b.safetensors")]
    with pytest.raises(InputError, match="b.safetensors is the same as a.safetensors"):
        fused(directory, *texts)


def test_models_in_memory_say_what_to_do(directory):
    from cachec.compiler.models import wrap_pipeline

    with pytest.raises(InputError, match=r"are in memory: fuse the LoRA there \(pipe.load_lora_weights"):
        wrap_pipeline(FLUX.load(directory)).fuse([])


def test_each_of_two_transformers_has_its_own(saved_family, tmp_path):
    directory = str(saved_family("wan-2.2"))
    plain = load_model(find_model(directory))
    made = [pairs(one.transformer, ["blocks.0.attn1.to_q"], seed=seed) for seed, one in enumerate((plain, plain.expert[0]))]
    high, low = (write_lora(tmp_path / f"{name}.safetensors", one) for name, one in zip(("high", "low"), made, strict=True))
    model = fused(directory, f"{high}@transformer:2", f"{low}@transformer_2")
    check(model, plain.transformer, [(made[0], 2.0)])
    check(model.expert[0], plain.expert[0].transformer, [(made[1], 1.0)])
    assert [(one["name"], one["part"]) for one in model.loras] == [
        ("high.safetensors", "transformer"), ("low.safetensors", "transformer_2")
    ]  # fmt: skip
    hashes = {fused(directory, *texts).weights_hash for texts in ([f"{high}@transformer"], [f"{high}@transformer_2"], [])}
    assert len(hashes | {model.weights_hash}) == 4
    with pytest.raises(
        InputError, match="has two transformers: say which .*high.safetensors is for, as high.safetensors@transfo"
    ):
        fused(directory, high)
    with pytest.raises(InputError, match="low.safetensors is for transformer_3, and WanPipeline has no such transformer"):
        fused(directory, f"{low}@transformer_3")
