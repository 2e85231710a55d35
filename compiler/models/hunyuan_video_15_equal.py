"""HunyuanVideo-1.5's transformer for text to video, without the branches and gathers that ``torch.export`` cannot take.

The original sorts the tokens of both texts into those that count and those that do not, and masks the latter. Texts have no
positions, so that their order does not matter: here all tokens stay where they are, and what does not count is masked as keys.
Rows of such tokens are then not zero as there, but nothing reads them; and no row is masked whole, which is not a number
(NaN) in some back ends. Without a picture the original masks all picture tokens: here there are none.
"""

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.nn import functional

from cachec.compiler.models.equal_modules import EqualModule, with_child


class HunyuanVideo15Equal(EqualModule):
    """``HunyuanVideo15Transformer3DModel`` as ``HunyuanVideo15Pipeline`` calls it: neither first frame nor picture."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.config = original.config
        blocks = (with_child(block, "attn", _Attention(block.attn)) for block in original.transformer_blocks)
        self.transformer_blocks = nn.ModuleList(blocks)
        embedder, refiner = original.context_embedder, original.context_embedder.token_refiner
        refiners = nn.ModuleList(with_child(block, "attn", _TextAttention(block.attn)) for block in refiner.refiner_blocks)
        self.context_embedder = with_child(embedder, "token_refiner", with_child(refiner, "refiner_blocks", refiners))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_hidden_states_2: torch.Tensor,
        encoder_attention_mask_2: torch.Tensor,
        target_timestep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """``hidden_states`` [B, C, F, H, W] are the latents alone; texts [B, L, D] with masks [B, L], ``timestep`` [B].

        ``target_timestep`` [B]: the second time, of a model that is told one (``use_meanflow``).
        """
        rotary = self.rope(hidden_states)
        time = self.time_embed(timestep, target_timestep)
        states = self.x_embedder(self._with_empty_channels(hidden_states))
        text_mask, glyph_mask = encoder_attention_mask.bool(), encoder_attention_mask_2.bool()
        kinds = self.cond_type_embed.weight  # of text, glyphs and pictures
        text = self._refine(encoder_hidden_states, timestep, text_mask) + kinds[0]
        glyphs = self.context_embedder_2(encoder_hidden_states_2) + kinds[1]
        texts, mask = torch.cat([glyphs, text], 1), torch.cat([glyph_mask, text_mask], 1)
        keys = functional.pad(mask, (states.shape[1], 0), value=True)[:, None, None, :]
        for block in self.transformer_blocks:
            states, texts = block(states, texts, time, keys, rotary)
        return (self._unpatchify(self.proj_out(self.norm_out(states, time)), hidden_states),)

    def _with_empty_channels(self, latents: torch.Tensor) -> torch.Tensor:
        """Behind the latents, those of the first frame and its mask: zero without one."""
        return functional.pad(latents, (0, 0, 0, 0, 0, 0, 0, self.config.in_channels - latents.shape[1]))

    def _refine(self, text: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        refiner: Any = self.context_embedder
        counts = mask[..., None].to(text.dtype)
        pooled = (text * counts).sum(1) / counts.sum(1)
        time, states = refiner.time_text_embed(timestep, pooled), refiner.proj_in(text)
        for block in refiner.token_refiner.refiner_blocks:
            states = block(states, time, mask[:, None, None, :])
        refined: torch.Tensor = states
        return refined

    def _unpatchify(self, states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        config = self.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        grid = [size // side for size, side in zip(latents.shape[2:], patch, strict=True)]
        tokens = states.reshape(-1, *grid, self.config.out_channels, *patch)
        return tokens.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class _TextAttention(EqualModule):
    """Self-attention of text tokens, with a mask [B, 1, 1, keys]."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._heads = original.heads

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: None, attention_mask: torch.Tensor) -> torch.Tensor:
        projected = (project(hidden_states) for project in (self.to_q, self.to_k, self.to_v))
        query, key, value = (_split(one, self._heads).transpose(1, 2) for one in projected)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        made: torch.Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2, 3))
        return made


class _Attention(EqualModule):
    """What ``HunyuanVideo15AttnProcessor2_0`` does, with a mask [B, 1, 1, keys] instead of [B, 1, queries, keys]."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._heads = original.heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = (_split(one(hidden_states), self._heads) for one in (self.to_q, self.to_k, self.to_v))
        query, key = (apply_rotary_emb(one, image_rotary_emb, sequence_dim=1) for one in (self.norm_q(query), self.norm_k(key)))
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text_query, text_key, text_value = (_split(one(encoder_hidden_states), self._heads) for one in added)
        pairs = ((query, self.norm_added_q(text_query)), (key, self.norm_added_k(text_key)), (value, text_value))
        query, key, value = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        joint, length = attended.transpose(1, 2).flatten(2, 3), hidden_states.shape[1]
        return self.to_out[0](joint[:, :length]), self.to_add_out(joint[:, length:])


def _split(states: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.unflatten(states, 2, (heads, -1))
