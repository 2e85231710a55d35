"""Weights on disk: headers are checked against the model before anything is read."""

import json
import struct
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from toy import ToyDiT

from cachec.compiler.models.shards import Shards, Stored
from cachec.runtime.errors import ModelUnavailableError


@pytest.fixture
def files(tmp_path):
    """The toy's weights in two files, of three types."""
    types = {"out.weight": torch.float16, "out.bias": torch.float32}
    state = {name: value.to(types.get(name, torch.bfloat16)) for name, value in ToyDiT().state_dict().items()}
    names = sorted(state)
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, some in zip(parts, (names[::2], names[1::2]), strict=True):
        save_file({name: state[name] for name in some}, path)
    return parts


def open_toy(files, **options):
    return Stored.open(partial(ToyDiT, **options), files, "config.json")


def test_tensors_are_read_as_they_were_written_and_buffers_have_their_values(files):
    stored, wanted = open_toy(files), ToyDiT().state_dict()
    for name, place in stored.shards.places.items():
        value = stored.shards.read(name)
        assert value.dtype == place.dtype
        assert torch.equal(value, wanted[name].to(place.dtype))
    assert torch.equal(stored.module.positions, wanted["positions"])
    assert all(parameter.is_meta for parameter in stored.module.parameters())  # nothing is held


def test_tensors_that_are_not_the_models_are_refused_by_name(files):
    with pytest.raises(ModelUnavailableError, match="fit config.json: blocks.2.*is not the model's.*and 7 more"):
        open_toy(files, num_blocks=2)
    with pytest.raises(ModelUnavailableError, match="blocks.3.mlp.0.bias is missing .and 7 more.. Download the model again"):
        open_toy(files, num_blocks=4)
    with pytest.raises(ModelUnavailableError, match="is in .*a.safetensors and in .*a.safetensors: remove one"):
        open_toy([files[0], *files])


def test_a_tensor_of_another_shape_is_refused(files):
    save_file({"out.bias": torch.zeros(9), "out.weight": torch.zeros(8, 8)}, files[0].with_name("c.safetensors"))
    rest = {name: torch.zeros_like(value) for name, value in ToyDiT().state_dict().items() if not name.startswith("out.")}
    save_file(rest, files[0])
    with pytest.raises(ModelUnavailableError, match=r"out.bias in c.safetensors is \[9\], not \[8\]"):
        open_toy([files[0], files[0].with_name("c.safetensors")])


def test_integers_are_values_of_buffers_and_not_of_weights(tmp_path):
    state = ToyDiT().state_dict()
    path = tmp_path / "x.safetensors"
    save_file({**state, "positions": torch.ones(6, 1, dtype=torch.int64)}, path)
    assert torch.equal(open_toy([path]).module.positions, torch.ones(6, 1))
    save_file({**state, "out.bias": torch.ones(8, dtype=torch.uint8)}, path)
    with pytest.raises(ModelUnavailableError, match="out.bias in .* is torch.uint8: quantised weights cannot be compiled"):
        open_toy([path])


def header(content, data=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut off: its header is not whole"),
        (struct.pack("<Q", 99) + b"{", "is cut off: its header is not whole"),
        (header(b"no json"), "its header is no JSON"),
        (header([1]), "its header is not whole"),
        (header({"x": {"dtype": "F32", "shape": [2]}}), "its header says of x"),
        (header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}}, bytes(4)), "its header says of x"),
        (
            header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, bytes(4)),
            "x of .-1. F32 has -4 bytes",
        ),
        (
            header({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"ab"),
            "x in .* is F8_E4M3: quantised weights cannot",
        ),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}, bytes(7)), r"x of \[2\] F32 has 7 bytes"),
        (
            header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)),
            "is cut off: it has .* bytes, and x ends",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelUnavailableError, match=message):
        Shards.open([path])


def test_a_file_that_goes_away_or_shrinks_is_named(files):
    shards = Shards.open(files)
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    last = max((name for name in shards.places if shards.places[name].file == files[1]), key=lambda n: shards.places[n].begin)
    with pytest.raises(ModelUnavailableError, match="b.safetensors cannot be read: it ends .* bytes early"):
        shards.read(last)
    files[1].unlink()
    with pytest.raises(ModelUnavailableError, match="b.safetensors cannot be read: No such file"):
        shards.read(last)
    with pytest.raises(ModelUnavailableError, match="cannot be read: No such file"):
        Shards.open(files)
