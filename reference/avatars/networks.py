"""What the reference models have in common: sizes of latents, the sampler; and FLUX's transformer."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from reference.avatars.render import SIDE
from reference.avatars.text import WIDTH

LATENT_CHANNELS = 16
LATENT_SIDE = SIDE // 8
SHIFT = 1.15  # the mu that FLUX.1-dev has at 1024 x 1024


def build_transformer() -> FluxTransformer2DModel:
    """FLUX at width 192: 3 double and 6 single blocks, guidance embedding on."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 16, 16),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=SHIFT, max_shift=SHIFT)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, 16, 16, 16] to FLUX's tokens [B, 64, 64]: each 2 x 2 patch is a token."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def image_ids() -> torch.Tensor:
    """Rotary positions [64, 3] of the packed tokens."""
    side = LATENT_SIDE // 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None, :]
    return ids.reshape(side * side, 3)
