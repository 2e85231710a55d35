"""The compiler: from a diffusers pipeline to a bundle. Read ``pipeline.py`` first."""

import importlib.util

from cachec.runtime.errors import missing_extra

if importlib.util.find_spec("torch") is None:
    raise missing_extra("torch", "compile", "the compiler")
