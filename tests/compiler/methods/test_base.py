"""What every method has in common: options, published schedules, and refusals."""

import pytest
from toy_calibration import make_calibration

from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.foca import FoCa
from cachec.compiler.methods.hicache import HiCache
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.schedule import Schedule, interval_for_budget, interval_schedule
from cachec.runtime.errors import InputError, PredictorError


def test_options_are_the_fields_in_their_types():
    assert HiCache.with_options({"order": "3", "sigma": "0.7"}) == HiCache(3, 0.7)
    assert FoCa.with_options({"form": "recursive"}).options() == {"form": "recursive"}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Taylor, {"ordre": "1"}, "Did you mean 'order'"),
        (Taylor, {"order": "two"}, "order is 'two'; it must be a whole number"),
        (HiCache, {"sigma": "wide"}, "sigma is 'wide'; it must be a number"),
        (HiCache, {"sigma": "nan"}, "must be finite"),
    ],
)
def test_wrong_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        method.with_options(options)


def test_a_methods_own_schedule_is_the_counter_rule():
    assert Taylor().interval(50, 6) == interval_schedule(50, 6)
    assert Adams().published(50, 8) == interval_for_budget(50, 8)


def test_what_has_nothing_to_fit_says_so():
    with pytest.raises(PredictorError, match="method 'taylor' has nothing to calibrate; compile it as it is"):
        Taylor().calibrate(make_calibration(2, 4), Schedule(4, (0, 1)))
    with pytest.raises(PredictorError, match="method 'taylor' has nothing to train; compile it as it is"):
        Taylor().fit(None)
    assert Taylor().draft() == Taylor()
