"""The two trained networks of tiny-flux, and where its files go."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from reference.dataset import SIDE
from reference.text import WIDTH

PIPELINE_DIR = Path(__file__).parent.parent / "compiler" / "models" / "tiny-flux"
LATENT_CHANNELS = 16
LATENT_SIDE = SIDE // 4
SHIFT = 1.15  # the mu that FLUX.1-dev has at 1024 x 1024


def build_autoencoder() -> AutoencoderKL:
    """RGB 64 x 64 to 16 channels at 16 x 16 and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


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


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures [S, S, 3] in [0, 1] to a batch [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
