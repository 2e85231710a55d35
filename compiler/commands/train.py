"""``cachec train``: a predictor, into a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.crew import choose_crew, first_device
from cachec.compiler.calibration.workers import at_work
from cachec.compiler.commands.recipes import ModelRecorder, check_torch_device
from cachec.compiler.models import find_model, load_model
from cachec.compiler.options import check_single, read_options
from cachec.runtime.device import CPU
from cachec.runtime.errors import PredictorError, need
from cachec.runtime.files import check_file, write_file
from cachec.runtime.work import remove_work


def train_to_file(source: str, out: Path, *, force: bool, **options: Any) -> list[tuple[str, str]]:
    """Train a method's predictor for the model ``source`` into ``out``, with work files beside it until it is done.

    ``options`` are those that ``cachec.compiler.options`` declares for it. Workers record the model's runs; the training itself
    is done here, on ``--device`` or the first of ``--devices``. Returns the rows of a short table.

    Raises:
        PredictorError: the method has nothing to train.
        InputError: an option cannot be used, or there are too few prompts.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    need("torch", "diffusers", "transformers", extra="compile", purpose="training")
    wish = read_options(options, "train")
    crew = choose_crew(wish.workers, wish.build.device, check_torch_device, default=CPU)
    from cachec.compiler.frontend import training_evaluator, training_of
    from cachec.compiler.methods.parameters import predictor_bytes
    from cachec.compiler.methods.training import record_for_training, train_predictor
    from cachec.compiler.planning.room import check_training
    from cachec.compiler.request import check_wish

    spec = find_model(source)
    device = first_device(wish.workers, wish.build.device)
    request = check_wish(spec, replace(wish, build=replace(wish.build, device=device)))
    check_torch_device(request.device)
    if not request.method.needs_training:
        raise PredictorError(f"method {request.method.name!r} has nothing to train: compile it as it is")
    check_single(wish.model)
    training = training_of(spec, request)
    check_file(out, force=force)
    work = out.with_name(out.name + ".training")
    model = load_model(spec, loras=request.loras)
    if crew is not None:
        check_training(model, request.settings, len(training.prompts.prompts), work)
        recipe = ModelRecorder(spec.portable_source, request.settings, request.loras)
        with model.hashing_weights(), at_work(crew, recipe) as recorders:
            record_for_training(model, recorders, training, work=work)
    with model.hashing_weights():
        evaluator = training_evaluator(model, request, training, work)
        parameters = train_predictor(model, evaluator, training, work=work)
    write_file(out, predictor_bytes(parameters))
    remove_work(work)
    facts = [(name, text) for name, text in parameters.facts.items() if name != "curve" and len(text) < 80]
    return [("predictor", str(out)), *facts]
