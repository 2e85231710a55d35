"""Models with a short name, and those of which the configuration ships."""

from pathlib import Path

from cachec.compiler.models.base import ModelSpec

TINY_FLUX_DIR = Path(__file__).parent / "tiny-flux"
CONFIGS = Path(__file__).parent / "configs"

# by Hub id, folders with the published configuration of models that are too large to ship
PUBLISHED = {f"black-forest-labs/{name}": CONFIGS / name for name in ("FLUX.1-dev", "FLUX.1-schnell")}

MODELS = {
    "flux": ModelSpec("flux", "black-forest-labs/FLUX.1-dev", height=1024, width=1024, text_tokens=512, guidance=3.5),
    "tiny-flux": ModelSpec(
        "tiny-flux",
        str(TINY_FLUX_DIR),
        height=64,
        width=64,
        text_tokens=16,
        guidance=3.5,
        prompts="shapes",
        packaged=True,
        probe=TINY_FLUX_DIR / "probe.safetensors",
    ),
}
