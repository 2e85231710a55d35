"""The compiler: from a diffusers pipeline to a bundle. Read ``pipeline.py`` first."""
