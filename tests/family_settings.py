"""Small settings for the small pipelines of ``families.py``."""

from dataclasses import replace

from cachec.compiler.models.base import Settings

SETTINGS = Settings(height=32, width=48, text_tokens=24, guidance=3.0, steps=4, dtype="float32")
VIDEO = {"frames": 5}
OTHERS = {
    "dit": {"height": 64, "width": 64, "text_tokens": 1},
    "flux": {"true_cfg_scale": 2.0},
    "flux-kontext": {"true_cfg_scale": 2.0},
    "flux-2": {"text_tokens": 96},
    "flux-2-klein": {"text_tokens": 48},
    "hunyuan-video": VIDEO,
    "hunyuan-video-1.5": {**VIDEO, "text_tokens": 64},
    "qwen-image-edit": {"height": 128, "width": 192, "text_tokens": 96, "steps": 2},
    "wan-2.1": VIDEO,
    "wan-2.2": VIDEO,
    "wan-i2v": {**VIDEO, "text_tokens": 512},
    "wan-2.2-5b": {**VIDEO, "height": 64, "width": 96},
    "z-image": {"text_tokens": 48},
}
# guidance, a sampler that looks back, one from outside; make models has all
SOME = ("flux", "qwen-image", "pixart-sigma", "auraflow")


def settings_for(family):
    return replace(SETTINGS, **OTHERS.get(family.name, {}))
