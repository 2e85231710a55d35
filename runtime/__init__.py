"""The light runtime: open a bundle and play it back. Needs numpy and safetensors only."""
