from collections import deque

import pytest
from toy_tables import check_exact, check_recursion

from cachec.compiler.methods.foca import FORMS, FoCa
from cachec.runtime.errors import InputError


def foca(method, features, schedule):
    result, values, anchors, at = {}, deque(maxlen=2), deque(maxlen=2), None
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            values.append(features[step])
            anchors.append(features[step])
            at = step
            continue
        if len(anchors) < 2:
            value = anchors[-1]
        elif method.form == "recursive":  # cache-dit's lines: a BDF2 predictor, then its Heun corrector
            predicted = 2.0 * values[1] - values[0]
            value = predicted + 0.5 * ((anchors[1] - anchors[0]) - (values[1] - values[0]))
        else:
            elapsed = step - at
            reach = min(elapsed, 3)
            value = anchors[1] + (reach / 2) * ((anchors[1] - anchors[0]) + (values[1] - values[0]))
            if elapsed > 3:
                value = (3 / elapsed) * value + (1 - 3 / elapsed) * anchors[1]
        result[step] = value
        values.append(value)
    return result


@pytest.mark.parametrize("form", FORMS)
def test_foca_is_cache_dits_lines_and_exact_on_constants(form):
    check_recursion(FoCa(form), foca)
    check_exact(FoCa(form), 0, 1)


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="form is 'heun'; foca takes anchored or recursive"):
        FoCa("heun")
