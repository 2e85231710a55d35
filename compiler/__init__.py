"""The compiler: from a diffusers pipeline to a bundle. Read ``pipeline.py`` first."""

import importlib.util

from cachec.runtime.errors import missing_extra

for _package in ("torch", "diffusers", "transformers"):  # what only parts of it need, they ask for themselves
    if importlib.util.find_spec(_package) is None:
        raise missing_extra(_package, "compile", "compiling, and making pictures from text,")
