"""Makes ``import cachec`` take the source tree that this file is in, installed or not, whatever the folder is called.

For programs that are started from a bare source tree; import it before anything of cachec.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "cachec" not in sys.modules:
    spec = importlib.util.spec_from_file_location("cachec", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["cachec"] = package
    spec.loader.exec_module(package)
