"""Whatever a manifest, a program or a request says: it is read, or refused in words that a person reads."""

import asyncio
import json

import pytest
from damage import places_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from cachec.runtime.bundle import MANIFEST, Bundle, Manifest, _digest
from cachec.runtime.errors import BundleError
from cachec.runtime.program import Program
from cachec.serving.bodies import JSON, json_body
from cachec.serving.refusals import Refused
from cachec.serving.wishes import ImageWish, VideoWish, read_wish

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
LONGEST = 800  # characters of a message; one that lists all fields of a request is the longest
check = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def outcome(read, refusal):
    """What ``read`` returns and ``None``; or ``None`` and how it was refused."""
    try:
        return read(), None
    except refusal as error:
        return None, error


def put(data, place, value):
    """``data`` with another value at a place."""
    changed = json.loads(json.dumps(data))
    around = changed
    for key in place[:-1]:
        around = around[key]
    around[place[-1]] = value
    return changed


@check
@given(st.data())
def test_a_manifest_is_read_and_written_the_same_or_refused(toy_bundle, tmp_path, data):
    original = json.loads((toy_bundle / MANIFEST).read_text())
    changed = put(original, data.draw(st.sampled_from(list(places_in(original)))), data.draw(ANYTHING))
    changed["digest"] = _digest({k: v for k, v in changed.items() if k != "digest"})
    (tmp_path / MANIFEST).write_text(json.dumps(changed))
    manifest, refused = outcome(lambda: Bundle.read_manifest(tmp_path), BundleError)
    if refused:
        assert len(str(refused).replace(str(tmp_path), "")) < LONGEST
    else:
        assert repr(Manifest.from_json(json.loads(json.dumps(manifest.to_json())))) == repr(manifest)  # NaN is not equal to NaN


@check
@given(st.data())
def test_a_program_is_read_and_written_the_same_or_refused(toy_bundle, data):
    program = Bundle.open(toy_bundle).program()
    original, arrays = program.to_json(), program.arrays()
    changed = put(original, data.draw(st.sampled_from(list(places_in(original)))), data.draw(ANYTHING))
    read, refused = outcome(lambda: Program.from_json(changed, arrays), BundleError)
    if refused:
        assert len(str(refused)) < LONGEST
    else:
        assert Program.from_json(json.loads(json.dumps(read.to_json())), read.arrays()).digest() == read.digest()


@pytest.mark.parametrize("kind", [ImageWish, VideoWish])
@pytest.mark.parametrize("text", [False, True], ids=["json", "form"])
@check
@given(data=st.data())
def test_fields_of_a_request_are_taken_or_refused(kind, text, data):
    names = st.sampled_from(sorted(kind.model_fields)) | st.text(max_size=8)
    values = st.text(max_size=30) if text else ANYTHING
    fields = data.draw(st.dictionaries(names, values, max_size=3)) | data.draw(st.sampled_from([{}, {"prompt": "a face"}]))
    wish, refused = outcome(lambda: read_wish(kind, fields, text=text), Refused)
    if refused:
        assert refused.status_code == 400
        assert len(refused.detail) < LONGEST
        json.dumps(refused.to_json()).encode()
    else:
        assert read_wish(kind, wish.model_dump(exclude_unset=True)) == wish


@check
@given(st.binary(max_size=64) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_a_body_is_json_or_refused(body):
    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "headers": [(b"content-type", JSON.encode())]}, receive)
    value, refused = outcome(lambda: asyncio.run(json_body(request)), Refused)
    if refused:
        assert refused.status_code == 400
    else:
        assert repr(value) == repr(json.loads(body))
