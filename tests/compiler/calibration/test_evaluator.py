import pytest
from toy_calibration import make_evaluator

from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.runtime.errors import InputError


def test_who_needs_gradients_is_refused_by_name_where_there_are_none():
    make_evaluator().check_gradients("bns")
    engines = EngineEvaluator({}, make_evaluator()._io)
    with pytest.raises(InputError, match="bns needs gradients of the model, which a built engine does not give"):
        engines.check_gradients("bns")
    with pytest.raises(InputError, match="this fit needs gradients"):
        engines.evaluate_with_gradients(None, None, {})
