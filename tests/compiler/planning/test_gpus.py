import pytest

from cachec.compiler.planning.gpus import GPUS, find_measured, get_gpus
from cachec.runtime.errors import InputError


@pytest.mark.parametrize("name", ["RTX-4090", "rtx 4090", " rtx-4090 "])
def test_a_gpu_is_found_as_people_write_it(name):
    assert get_gpus(name) == (GPUS["RTX-4090"],)


def test_an_unknown_one_is_refused_with_the_list_and_none_is_all():
    with pytest.raises(InputError, match=r"unknown GPU 'H10'. Did you mean 'H100'\? Known: A100, B200, H100"):
        get_gpus("H10")
    assert get_gpus(None) == tuple(GPUS.values())


def test_what_others_measured_is_of_one_size_and_one_gpu():
    wanted = ("black-forest-labs/FLUX.1-dev", 1024, 1024, "H100")
    found = find_measured(*wanted)
    assert found is not None
    assert found.seconds == 0.1289
    assert find_measured(*wanted[:1], 512, *wanted[2:]) is None
    assert find_measured(*wanted[:3], "H200") is None
