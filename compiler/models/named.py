"""Models with a short name, and those of which the configuration ships."""

from pathlib import Path

from cachec.compiler.models.base import ModelSpec
from cachec.compiler.models.distribution import SOURCE

TINY_FLUX_DIR = Path(__file__).parent / "tiny-flux"
CONFIGS = Path(__file__).parent / "configs"
AVATARS = 'learned from avatars adapted from "ToonHead" by Johan Melin (https://www.johanmelin.com), CC BY 4.0'

# by Hub id, folders with the published configuration of models that are too large to ship
PUBLISHED = {
    **{f"black-forest-labs/{name}": CONFIGS / name for name in ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.1-Kontext-dev")},
    "Qwen/Qwen-Image": CONFIGS / "Qwen-Image",
    "Qwen/Qwen-Image-Edit": CONFIGS / "Qwen-Image-Edit",
    "stabilityai/stable-diffusion-3-medium-diffusers": CONFIGS / "stable-diffusion-3-medium",
    "stabilityai/stable-diffusion-3.5-large": CONFIGS / "stable-diffusion-3.5-large",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": CONFIGS / "PixArt-Sigma-XL-2-1024-MS",
    "facebook/DiT-XL-2-256": CONFIGS / "DiT-XL-2-256",
    **{f"black-forest-labs/{name}": CONFIGS / name for name in ("FLUX.2-dev", "FLUX.2-klein-4B")},
    "hunyuanvideo-community/HunyuanVideo": CONFIGS / "HunyuanVideo",
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": CONFIGS / "HunyuanVideo-1.5-480p_t2v",
    **{f"Wan-AI/Wan2.1-{name}-Diffusers": CONFIGS / f"Wan2.1-{name}" for name in ("T2V-14B", "I2V-14B-480P")},
    **{f"Wan-AI/Wan2.2-{name}-Diffusers": CONFIGS / f"Wan2.2-{name}" for name in ("T2V-A14B", "I2V-A14B", "TI2V-5B")},
    **{f"Tongyi-MAI/{name}": CONFIGS / name for name in ("Z-Image", "Z-Image-Turbo")},
}

# about a million pixels, used with FLUX and Stable Diffusion alike, and bins of PixArt's; their authors list none
MEGAPIXEL = ("1024x1024", "832x1216", "1216x832", "896x1152", "1152x896", "768x1344", "1344x768")
# what FluxKontextPipeline brings every picture to: PREFERRED_KONTEXT_RESOLUTIONS of diffusers 0.42.1
TALL = ("944x1104", "880x1184", "832x1248", "800x1328", "752x1392", "720x1456", "688x1504", "672x1568")
KONTEXT = ("1024x1024", *TALL, *("x".join(reversed(size.split("x"))) for size in TALL))
# as the models' own READMEs list them: tencent/HunyuanVideo (720p), Qwen/Qwen-Image, Wan-Video/Wan2.1 and 2.2
HUNYUAN_VIDEO = tuple(f"{size}x129" for size in ("1280x720", "720x1280", "1104x832", "832x1104", "960x960"))
QWEN_IMAGE = ("1328x1328", "1664x928", "928x1664", "1472x1104", "1104x1472", "1584x1056", "1056x1584")
WAN = tuple(f"{size}x81" for size in ("832x480", "480x832", "1280x720", "720x1280"))

MODELS = {
    "dit": ModelSpec("dit", "facebook/DiT-XL-2-256", 256, 256, text_tokens=1, guidance=4.0, prompts="classes"),
    "flux": ModelSpec(
        "flux", "black-forest-labs/FLUX.1-dev", height=1024, width=1024, text_tokens=512, guidance=3.5, sizes=MEGAPIXEL
    ),
    "flux-kontext": ModelSpec(
        "flux-kontext", "black-forest-labs/FLUX.1-Kontext-dev", 1024, 1024, 512, 2.5, steps=28, sizes=KONTEXT
    ),
    "flux-schnell": ModelSpec(
        "flux-schnell", "black-forest-labs/FLUX.1-schnell", 1024, 1024, 256, guidance=0.0, steps=4, sizes=MEGAPIXEL
    ),
    "flux2": ModelSpec("flux2", "black-forest-labs/FLUX.2-dev", 1024, 1024, text_tokens=512, guidance=4.0, sizes=MEGAPIXEL),
    "flux2-klein": ModelSpec(
        "flux2-klein", "black-forest-labs/FLUX.2-klein-4B", 1024, 1024, 512, guidance=1.0, steps=4, sizes=MEGAPIXEL
    ),
    "hunyuan-video": ModelSpec(
        "hunyuan-video",
        "hunyuanvideo-community/HunyuanVideo",
        720,
        1280,
        text_tokens=256,
        guidance=6.0,
        frames=129,
        sizes=HUNYUAN_VIDEO,
    ),
    "hunyuan-video-1.5": ModelSpec(
        "hunyuan-video-1.5",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        480,
        848,
        text_tokens=1000,
        guidance=6.0,
        frames=121,
    ),
    "pixart": ModelSpec("pixart", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 1024, 1024, 300, 4.5, steps=20, sizes=MEGAPIXEL),
    "qwen-image": ModelSpec("qwen-image", "Qwen/Qwen-Image", 1328, 1328, text_tokens=512, guidance=4.0, sizes=QWEN_IMAGE),
    "qwen-image-edit": ModelSpec("qwen-image-edit", "Qwen/Qwen-Image-Edit", 1024, 1024, 1536, guidance=4.0, sizes=MEGAPIXEL),
    "sd3": ModelSpec(
        "sd3", "stabilityai/stable-diffusion-3-medium-diffusers", 1024, 1024, 256, guidance=7.0, steps=28, sizes=MEGAPIXEL
    ),
    "sd3.5": ModelSpec(
        "sd3.5", "stabilityai/stable-diffusion-3.5-large", 1024, 1024, 256, guidance=3.5, steps=28, sizes=MEGAPIXEL
    ),
    "tiny-flux": ModelSpec(
        "tiny-flux",
        str(TINY_FLUX_DIR),
        height=128,
        width=128,
        text_tokens=24,
        guidance=3.5,
        prompts="avatars",
        packaged=True,
        probe=TINY_FLUX_DIR / "probe.safetensors",
        credit=AVATARS,
    ),
    "tiny-hunyuan": ModelSpec(
        "tiny-hunyuan",
        f"{SOURCE}tiny-hunyuan",
        96,
        96,
        text_tokens=28,
        guidance=3.5,
        frames=9,
        prompts="clips",
        packaged=True,
        credit=AVATARS,
    ),
    "tiny-qwen": ModelSpec(
        "tiny-qwen",
        f"{SOURCE}tiny-qwen",
        128,
        128,
        text_tokens=25,
        guidance=3.5,
        prompts="avatars",
        packaged=True,
        probe=TINY_FLUX_DIR / "probe.safetensors",
        credit=AVATARS,
    ),
    "wan": ModelSpec("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 480, 832, text_tokens=512, guidance=5.0, frames=81, sizes=WAN),
    "wan-i2v": ModelSpec(
        "wan-i2v", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 480, 832, text_tokens=512, guidance=5.0, frames=81, sizes=WAN[:2]
    ),
    "wan-2.2": ModelSpec(
        "wan-2.2",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        720,
        1280,
        text_tokens=512,
        guidance=4.0,
        steps=40,
        frames=81,
        sizes=(*WAN[2:], *WAN[:2]),
    ),
    "wan-2.2-i2v": ModelSpec(
        "wan-2.2-i2v", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", 480, 832, 512, guidance=3.5, steps=40, frames=81, sizes=WAN
    ),
    "wan-2.2-5b": ModelSpec(
        "wan-2.2-5b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        704,
        1280,
        text_tokens=512,
        guidance=5.0,
        frames=121,
        sizes=("1280x704x121", "704x1280x121"),
    ),
    "z-image": ModelSpec("z-image", "Tongyi-MAI/Z-Image", 1024, 1024, text_tokens=512, guidance=5.0, sizes=MEGAPIXEL),
    "z-image-turbo": ModelSpec(
        "z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", 1024, 1024, 512, guidance=0.0, steps=9, sizes=MEGAPIXEL
    ),
}
