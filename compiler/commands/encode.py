"""``cachec encode``: the conditions of prompts, into a file."""

from pathlib import Path
from typing import Any

from cachec.compiler.calibration.conditions import conditions_facts, save_conditions
from cachec.compiler.calibration.runs import encode_prompts
from cachec.compiler.calibration.uses import choose_prompts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.options import make_settings, read_options
from cachec.runtime.errors import need
from cachec.runtime.files import check_file


def encode_to_file(
    source: str, out: Path, *, num: int | None = None, force: bool = False, **options: Any
) -> list[tuple[str, str]]:
    """Encode the prompts of a calibration by the text encoders of the model ``source`` into ``out``.

    The transformer is not loaded. ``options`` are those that ``cachec.compiler.options`` declares for it. Returns the rows of
    a short table.

    Raises:
        InputError: there are too few prompts, an option cannot be used, or conditions are not finite.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    need("torch", "diffusers", "transformers", extra="compile", purpose="encoding prompts")
    wish, spec = read_options(options, "encode"), find_model(source)
    settings, chosen = make_settings(spec, wish.model), choose_prompts(spec.prompts, wish.fit.prompts, num)
    check_file(out, force=force)
    model = load_model(spec, with_transformer=False)
    conditions = encode_prompts(model, chosen.prompts, settings)
    save_conditions(conditions, chosen, conditions_facts(spec.name, settings), out)
    shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape[1:])) or 'number'}" for name, value in conditions.items())
    return [
        ("conditions", str(out)),
        ("prompts", chosen.in_words),
        ("of each", shapes),
        ("size", f"{out.stat().st_size / 1e6:.1f} MB"),
    ]
