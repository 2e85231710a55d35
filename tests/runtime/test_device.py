import pytest

from cachec.runtime.device import Host
from cachec.runtime.errors import EngineError


def test_too_large_a_buffer_is_refused_with_its_size():
    with pytest.raises(EngineError, match=r"there is no memory for a buffer of 4611686018427\.4 MB more: take a smaller batch"):
        Host().empty((1 << 30, 1 << 30), "float32")
