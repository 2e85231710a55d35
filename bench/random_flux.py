"""A FLUX pipeline directory of FLUX.1-dev's width with random weights: ``python -m bench.random_flux DIR DOUBLE SINGLE``.

``DOUBLE`` and ``SINGLE`` count the blocks; 19 and 38 are FLUX.1-dev. Weights are written in bfloat16, tensor by tensor, in
shards of 5 GB, so that little memory is needed; norms' scales lie around one, biases are small. Text encoders have FLUX's
output widths and next to no depth, and the autoencoder FLUX's eightfold scale: they are there to be called, not to mean
anything.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from cachec.compiler.models import TINY_FLUX_DIR

FLUX = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SHARD = 5 * 10**9  # bytes
BLOCK = 1 << 24  # random numbers, of which every tensor takes pieces
NAME = "diffusion_pytorch_model"


def write_flux(out: Path, double: int, single: int, config: Mapping[str, Any] = FLUX) -> int:
    """Write the directory; returns the transformer's bytes. ``config``: of the transformer, but for its blocks."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(TINY_FLUX_DIR / name, out / name, dirs_exist_ok=True)
    shutil.copy(TINY_FLUX_DIR / "model_index.json", out / "model_index.json")
    _write_scheduler(out / "scheduler/scheduler_config.json")
    torch.manual_seed(0)
    _write_others(out)
    return _write_transformer(out / "transformer", {**config, "num_layers": double, "num_single_layers": single})


def _write_transformer(folder: Path, config: Mapping[str, Any]) -> int:
    with init_empty_weights():
        model = FluxTransformer2DModel(**config)
    model.save_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    numbers = _Numbers()
    places = {}
    for index, shard in enumerate(shards):
        file = f"{NAME}-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{NAME}.safetensors"
        _write_shard(folder / file, shard, numbers)
        places |= dict.fromkeys(shard, file)
    total = sum(map(_bytes, shapes.values()))
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(content))
    return total


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], numbers: "_Numbers") -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + _bytes(shape)]}
        at += _bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in numbers.of(name, shape):
                file.write(piece.view(torch.uint8).numpy().data)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


class _Numbers:
    """Random tensors, made of rotated and scaled pieces of one block: writing them costs as much as copying."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(BLOCK, generator=self._generator).to(torch.bfloat16)

    def of(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A tensor's numbers, piece by piece."""
        size = math.prod(shape)
        if "norm_" in name and name.endswith("weight") and len(shape) == 1:  # of RMSNorm
            yield (1 + 0.1 * torch.randn(size, generator=self._generator)).to(torch.bfloat16)
            return
        scale = 0.02 if len(shape) == 1 else 0.7 / shape[-1] ** 0.5
        while size:
            offset = int(torch.randint(0, BLOCK // 2, (1,), generator=self._generator))
            piece = self._block[offset : offset + size] * (scale * (1 + 0.01 * torch.rand(1, generator=self._generator).item()))
            size -= len(piece)
            yield piece


def _write_scheduler(path: Path) -> None:
    flux = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **flux}))


def _write_others(out: Path) -> None:
    """Text encoders and autoencoder: those of tiny-flux, with FLUX's widths."""
    clip, t5, vae = (_config(name) for name in ("text_encoder", "text_encoder_2", "vae"))
    clip |= {
        "hidden_size": 768,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 12,
        "projection_dim": 768,
    }
    CLIPTextModel(CLIPTextConfig(**clip)).save_pretrained(out / "text_encoder")
    t5 |= {"d_model": 4096, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 1}
    T5EncoderModel(T5Config(**t5)).save_pretrained(out / "text_encoder_2")
    vae |= {
        "block_out_channels": [4, 4, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    AutoencoderKL(**vae).save_pretrained(out / "vae")


def _config(name: str) -> dict[str, object]:
    content = json.loads((TINY_FLUX_DIR / name / "config.json").read_text())
    return {key: value for key, value in content.items() if not key.startswith("_")}


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("double", type=int)
@click.argument("single", type=int)
def main(out: Path, double: int, single: int) -> None:
    """Write a FLUX pipeline directory with random weights."""
    click.echo(f"{write_flux(out, double, single) / 1e9:.2f} GB of weights in {out}")


if __name__ == "__main__":
    main()
