"""A three-block toy DiT: small enough to read its graphs, and with a tail that calls into the body again, as DiT's does.

``B`` batch, ``L = 6`` tokens, ``D = 8`` channels.
"""

import torch
from torch import nn

TOKENS, WIDTH = 6, 8


class Block(nn.Module):
    def __init__(self, *, head_axis: bool) -> None:
        super().__init__()
        self.head_axis = head_axis
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, gate = self.modulation(condition)[:, None].chunk(2, dim=-1)
        q, k, v = (self.qkv(self.norm(x) + shift)).chunk(3, dim=-1)
        x = x + gate * self.attention(q, k, v)
        return x + self.mlp(self.norm(x))

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.head_axis:
            return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return nn.functional.scaled_dot_product_attention(q, k, v)


class ToyDiT(nn.Module):
    """Predicts a velocity [B, L, D] from latents [B, L, D], timestep [B] and prompt [B, D].

    With ``head_axis`` it goes through ONNX, whose attention wants one; the numbers are the same.
    """

    def __init__(self, num_blocks: int = 3, *, head_axis: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(head_axis=head_axis) for _ in range(num_blocks))
        self.norm_out = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("positions", torch.arange(TOKENS).float()[:, None])

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        condition = torch.tanh(self.time(timestep[:, None])) + prompt
        x = self.embed(latents) + torch.sin(self.positions / 3.0)
        for block in self.blocks:
            x = block(x, condition)
        scale = self.blocks[0].modulation(condition)[:, None, :WIDTH]  # the tail reuses a module of the body
        return self.out(self.norm_out(x) * (1 + scale))


def example_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """Pairwise distinct inputs of the toy."""
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "prompt": torch.randn(batch, WIDTH, generator=generator),
    }
