"""``cachec compile``: a model, into a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachec.compiler.models import find_model, load_model
from cachec.runtime.errors import need
from cachec.runtime.write import check_output

if TYPE_CHECKING:
    from cachec.compiler.pipeline import Compilation


def compile_to_bundle(source: str, out: Path | None, *, force: bool, **options: Any) -> "tuple[Path, Compilation]":
    """Compile the model ``source`` into a bundle at ``out``, by default ``MODEL-METHOD.cachec``; says where it is.

    ``options`` are those that ``cachec.compiler.options`` declares.

    Raises:
        CachecError: of the kind that fits; nothing is left at ``out``, or a bundle that lacks only TensorRT's engines.
    """
    need("torch", "diffusers", "transformers", extra="compile", purpose="compiling")
    from cachec.compiler.pipeline import compile_bundle
    from cachec.compiler.request import make_request

    spec = find_model(source)
    request = make_request(spec, **options)
    out = out or Path(f"{spec.name.replace('/', '--')}-{request.method.name}.cachec")
    check_output(out, force=force)
    return out, compile_bundle(load_model(spec, loras=request.loras), request, out, force=force)
