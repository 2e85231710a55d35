import pytest
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

from cachec.compiler.cache_configs import schedule_options
from cachec.compiler.models import MODELS
from cachec.compiler.request import make_request
from cachec.runtime.errors import InputError

YAML = """
cache_config:
  cache_type: DBCache
  Fn_compute_blocks: 1
  residual_diff_threshold: 0.24
  steps_computation_mask: [1, 1, 0, 0, 1, 0]
  steps_computation_policy: static
  enable_taylorseer: true
  taylorseer_order: 2
"""
STATIC = {"steps_computation_mask": "110010", "steps_computation_policy": "static"}


def test_a_yaml_of_cache_dit_is_a_method_and_a_schedule(tmp_path):
    file = tmp_path / "cache.yaml"
    file.write_text(YAML)
    assert schedule_options(file, 6) == {"method": "taylor", "options": {"order": "2"}, "schedule": "0,1,4"}
    assert schedule_options(STATIC, 6) == {"method": "reuse", "options": {}, "schedule": "0,1,4"}
    assert schedule_options({**STATIC, "enable_foca": True}, 6)["method"] == "foca"


def test_diffusers_taylorseer_computes_the_steps_that_it_computes_there():
    """In diffusers 0.42: warm-up, then one step behind it and every interval from there on, and the end."""
    config = TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=2, disable_cache_after_step=10, max_order=1)
    assert schedule_options(config, 12) == {"method": "taylor", "options": {"order": "1"}, "schedule": "0,1,3,7,10,11"}


def test_compile_takes_it_in_place_of_a_method_and_a_schedule(tmp_path):
    file = tmp_path / "cache.yaml"
    file.write_text(YAML)
    request = make_request(MODELS["flux"], config=file, steps=6)
    assert (request.method.options(), request.schedule.compute) == ({"order": 2}, (0, 1, 4))
    with pytest.raises(InputError, match="--config says which steps are computed and how, and so does --budget: give one"):
        make_request(MODELS["flux"], config=file, steps=6, budget=3)
    with pytest.raises(InputError, match="--config is of one number of steps, and 6, 8 are asked for"):
        make_request(MODELS["flux"], config=file, steps="6,8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            FirstBlockCacheConfig(threshold=0.07),
            "FirstBlockCacheConfig with threshold 0.07 decides while the model runs.*--budget",
        ),
        ({"residual_diff_threshold": 0.08}, "without steps_computation_mask decides while the model runs.*--budget"),
        ({**STATIC, "steps_computation_policy": "dynamic"}, "'dynamic' decides while .* set steps_computation_policy: static"),
        ({**STATIC, "cache_type": "DBPrune"}, "cache_type 'DBPrune' leaves out blocks"),
        ({**STATIC, "enable_dmd": True}, "a calibrator that cachec does not know"),
        ({**STATIC, "steps_computation_mask": "1100"}, "is of 4 steps, and 6 are asked for: give --steps 4"),
        ({**STATIC, "steps_computation_mask": [1, 2, 0, 0, 1, 0]}, "holds 2; it has 1"),
        ({**STATIC, "steps_computation_mask": "011000"}, "must start at step 0"),
        ({"cache_config": 3}, "cache_config is 3; it must be keys"),
        (3, "a int is no cache that cachec knows"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(config, message):
    with pytest.raises(InputError, match=message):
        schedule_options(config, 6)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is no YAML"), ("- 1", "it must be keys with values")])
def test_files_that_are_no_configuration(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        schedule_options(tmp_path / "x.yaml", 6)
    with pytest.raises(InputError, match="cache configuration .*not there|cache configuration"):
        schedule_options(tmp_path / "none.yaml", 6)
