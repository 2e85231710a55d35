"""Z-Image's transformer on tensors with a batch axis.

The original takes lists of samples, and pads each picture and each text to a multiple of 32 tokens with learned ones, which
are attended to; then it pads the samples of a batch to one length, and masks that. Here texts come padded, with a mask of what
is text; which of the rest is attended to, and where the picture lies behind the text, is computed from it.
"""

from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, RopeEmbedder
from torch import nn
from torch.nn import functional

from cachec.compiler.models.equal_modules import EqualModule, with_child

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [B, L, 1, half a head] each


class ZImageEqual(EqualModule):
    """``ZImageTransformer2DModel`` as ``ZImagePipeline`` calls it: one picture a sample, nothing to edit."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.config = original.config
        for name in ("noise_refiner", "context_refiner", "layers"):
            blocks = (with_child(block, "attention", _Attention(block.attention)) for block in getattr(original, name))
            setattr(self, name, nn.ModuleList(blocks))
        self._kind = f"{original.all_patch_size[0]}-{original.all_f_patch_size[0]}"
        self._side = original.all_patch_size[0]
        embedder, device = original.rope_embedder, original.x_pad_token.device
        turns = RopeEmbedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, embedder.theta)
        for axis, turn in enumerate(turns):  # [positions, half of the axis's part of a head]
            self.register_buffer(f"cosines_{axis}", turn.real.contiguous().to(device), persistent=False)
            self.register_buffer(f"sines_{axis}", turn.imag.contiguous().to(device), persistent=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cap_feats: torch.Tensor, cap_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """``x`` [B, C, H, W], ``t`` [B], ``cap_feats`` [B, L, D], of which ``cap_mask`` [B, L] is text, from the start on."""
        time = self.t_embedder.mlp(self._waves(t))
        rows, columns = (size // self._side for size in x.shape[2:])
        length = cap_mask.shape[1] + -cap_mask.shape[1] % SEQ_MULTI_OF
        is_text = functional.pad(cap_mask.bool(), (0, length - cap_mask.shape[1]))[..., None]
        text = self.cap_embedder(functional.pad(cap_feats, (0, 0, 0, length - cap_mask.shape[1])))
        text = torch.where(is_text, text, self.cap_pad_token)
        groups = (is_text.sum(1) + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF
        places = torch.arange(length, device=x.device)[None]
        seen = places < groups * SEQ_MULTI_OF
        text_rotary = self._rotary([1 + places, *(torch.zeros_like(places),) * 2], x.shape[0])
        for block in self.context_refiner:
            text = block(text, seen[:, None, None, :], text_rotary)

        picture, picture_rotary = self._embed(x, rows, columns, groups * SEQ_MULTI_OF + 1)
        for block in self.noise_refiner:
            picture = block(picture, None, picture_rotary, time)

        joint = torch.cat([picture, text], 1)
        keys = functional.pad(seen, (picture.shape[1], 0), value=True)[:, None, None, :]
        rotary = tuple(torch.cat(parts, 1) for parts in zip(picture_rotary, text_rotary, strict=True))
        for block in self.layers:
            joint = block(joint, keys, rotary, time)
        patches = self.all_final_layer[self._kind](joint, c=time)[:, : rows * columns]
        grid = patches.reshape(-1, rows, columns, self._side, self._side, x.shape[1])
        return (grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)

    def _waves(self, t: torch.Tensor) -> torch.Tensor:
        size = self.t_embedder.frequency_embedding_size
        waves: torch.Tensor = get_timestep_embedding(
            t * self.config.t_scale, size, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return waves.to(t.dtype)

    def _embed(self, x: torch.Tensor, rows: int, columns: int, behind: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
        """Tokens of the picture and their rotations; ``behind`` [B, 1]: its place on the axis on which the text lies."""
        grid = x.reshape(-1, x.shape[1], rows, self._side, columns, self._side)
        patches = self.all_x_embedder[self._kind](grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2))
        padding = -rows * columns % SEQ_MULTI_OF
        tokens = torch.cat([patches, self.x_pad_token.expand(x.shape[0], padding, -1)], 1) if padding else patches
        places = torch.arange(rows * columns, device=x.device)[None]
        of_picture = (behind.expand(-1, rows * columns), places // columns, places % columns)
        return tokens, self._rotary([functional.pad(axis, (0, padding)) for axis in of_picture], x.shape[0])

    def _rotary(self, places: list[torch.Tensor], batch: int) -> Rotary:
        """Rotations at the ``places`` [B or 1, L] of each axis."""
        cosines, sines = (
            torch.cat([getattr(self, f"{kind}_{axis}")[place].expand(batch, -1, -1) for axis, place in enumerate(places)], -1)[
                :, :, None
            ]
            for kind in ("cosines", "sines")
        )
        return cosines, sines


class _Attention(EqualModule):
    """What ``ZSingleStreamAttnProcessor`` does, in real arithmetic."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._heads = original.heads

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, freqs_cis: Rotary) -> torch.Tensor:
        projections = (self.to_q, self.to_k, self.to_v)
        query, key, value = (project(hidden_states).unflatten(-1, (self._heads, -1)) for project in projections)
        if self.norm_q is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        heads = (_rotated(query, *freqs_cis), _rotated(key, *freqs_cis), value)
        query, key, value = (one.transpose(1, 2) for one in heads)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        made: torch.Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2, 3))
        return made


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours in the last axis, turned; in float32, as the original does it."""
    real, imaginary = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
    pairs = (real * cosines - imaginary * sines, real * sines + imaginary * cosines)
    return torch.stack(pairs, -1).flatten(3).to(x.dtype)
