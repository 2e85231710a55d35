"""What TensorRT for RTX plans to hold for one attention with a mask of keys: repeated for every query, and as it is given it.

    python -m bench.masks [--tokens 32768]

ONNX Runtime's CPU kernel wants the mask of every query, so ONNX files repeat it; ``engines/tensorrt_from_onnx.py`` takes the
short one back. Engines are built in bfloat16, of two heads of 128, and not run.
"""

import argparse
import re
import tempfile
from pathlib import Path

import torch
from torch import nn

from cachec.engines.onnx_files import build_onnx
from cachec.engines.tensorrt_from_onnx import shorten_masks
from cachec.engines.tensorrt_library import TENSORRT_RTX
from cachec.runtime.specs import Signature, TensorSpec

HEADS, WIDTH = 2, 128


class Masked(nn.Module):
    """Self-attention to the keys that a mask [1, K] names."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x.sin(), x.cos(), attn_mask=mask[:, None, None])


def measure(tokens: int, work: Path) -> tuple[int, int]:
    """Bytes of scratch memory: with the mask of the ONNX file, and with the short one."""
    program = torch.export.export(
        Masked(), (torch.zeros(1, HEADS, tokens, WIDTH, dtype=torch.bfloat16), torch.ones(1, tokens, dtype=torch.bool))
    ).run_decompositions({})
    x = TensorSpec("x", (1, HEADS, tokens, WIDTH), "bfloat16")
    signature = Signature((x, TensorSpec("mask", (1, tokens), "bool")), (TensorSpec("y", x.shape, "bfloat16"),))
    path = build_onnx({"p": program}, {"p": signature}, work).graphs["p"]
    library = TENSORRT_RTX.load()

    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        """Keeps what the builder says of scratch memory."""

        def __init__(self) -> None:
            super().__init__()
            self.said: list[int] = []

        def log(self, severity: object, text: str) -> None:
            if found := re.search(r"Max Scratch Memory: (\d+) bytes", text):
                self.said.append(int(found[1]))

    def build(shorten: bool) -> int:
        builder = library.Builder(log := Log())
        network = builder.create_network()
        if not library.OnnxParser(network, log).parse_from_file(str(path)):
            raise RuntimeError("TensorRT for RTX does not read the file")
        if shorten:
            shorten_masks(library, network)
        if builder.build_serialized_network(network, builder.create_builder_config()) is None:
            raise RuntimeError("TensorRT for RTX does not build it")
        (scratch,) = log.said
        return scratch

    return build(False), build(True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.masks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, after = measure(asked.tokens, Path(folder))
    print(f"{asked.tokens} tokens: {before / 1e6:,.0f} MB with the mask repeated, {after / 1e6:,.0f} MB with the short one")
