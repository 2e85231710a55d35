import json

import pytest

from cachec.runtime.trace import Trace


def test_spans_are_written_in_chromes_format_and_summed_by_name():
    trace = Trace()
    trace.add("compute", 1_000, 3_000, steps=[0])
    trace.add("forecast", 3_000, 4_500)
    trace.add("compute", 5_000, 5_500, steps=[1])
    data = json.loads(trace.to_json())
    assert [(event["ph"], event["name"], event["ts"], event["dur"]) for event in data["traceEvents"]] == [
        ("X", "compute", 1.0, 2.0), ("X", "forecast", 3.0, 1.5), ("X", "compute", 5.0, 0.5),
    ]  # fmt: skip
    assert data["traceEvents"][0]["args"] == {"steps": [0]}
    assert list(trace.seconds()) == ["compute", "forecast"]
    assert trace.seconds()["compute"] == pytest.approx(2.5e-6)
