"""``cachec plan``: of a directory, of a model of which only the configuration is there, and of what there is not."""

import json
import shutil

import pytest
from toy_product import run_cli, succeed

from cachec.compiler.models import PUBLISHED, outline_model
from cachec.runtime.errors import InputError, ModelUnavailableError

SMALL = ["--height", "64", "--width", "48", "--text-tokens", "5", "--steps", "10", "--budget", "3"]


@pytest.fixture
def thin(tmp_path):
    """FLUX.1-dev with one block of each kind; without any weights, and without a VAE, whose scale is then FLUX's."""
    shutil.copytree(PUBLISHED["black-forest-labs/FLUX.1-dev"], tmp_path / "thin")
    path = tmp_path / "thin/transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 1, "num_single_layers": 1}))
    return tmp_path / "thin"


def test_a_model_without_weights_has_sizes_and_flops(thin):
    said = succeed("plan", thin, *SMALL, "--gpu", "h100", "--batch", "2", "--json")
    found = json.loads(said[said.index("{") :])  # behind what libraries have to say
    width, image, text, context = 3072, 4 * 3, 5, 4096
    blocks = (2 * 12 + 12) * width**2 + (2 * 6 + 3) * width**2  # streams of the double block, the single one; modulations
    embeddings = (256 + 256 + 768 + 3 * width) * width + 64 * width + context * width
    tail = 2 * width**2 + 64 * width
    assert found["parameters"]["body"] + found["parameters"]["tail"] == pytest.approx(blocks + embeddings + tail, rel=1e-3)
    assert found["feature"] == image * width * 2
    assert found["velocity"] == image * 64 * 4
    tokens = image + text
    products = 2 * 2 * 12 * tokens * width**2 + 2 * 4 * tokens**2 * width + 2 * context * width * text
    assert found["step_flops"]["computed"] == pytest.approx(products + 2 * (15 + 2 + 3) * width**2, rel=1e-2)
    assert found["cuts"]["hidden"]["slots"] == 2 * 3 * found["feature"]
    assert found["floor"].keys() == {"H100"}


def test_blocks_that_forecast_are_counted_without_values(thin):
    """DisCa on FLUX: a fusion and two single blocks; one slot, of image and text."""
    said = succeed("plan", thin, *SMALL, "--method", "disca", "--gpu", "h100")
    width, tokens = 3072, 4 * 3 + 5
    fusion, block = 3 * width**2 + 2 * width, (12 + 3) * width**2 + (3 + 3 + 1 + 4) * width + 2 * 128
    assert f"{(fusion + 2 * block) / 1e6:.2f} million parameters of its own" in said
    assert f"of {tokens * width * 2 / 1e3:.2f} kB each" in said
    assert f"hidden cut {tokens * width * 2 / 1e3:.2f} kB" in said
    assert "output cut" not in said  # which has no blocks of its own
    found = json.loads(succeed("plan", thin, *SMALL, "--method", "disca", "--gpu", "h100", "--json"))
    assert found["floor"]["H100"]["request"] == pytest.approx(found["cuts"]["hidden"]["flops"] / 989e12, rel=1e-3)


def test_the_toy_is_planned_from_its_directory(toy_directory):
    words = succeed("plan", toy_directory, "--steps", "4", "--dtype", "float32")
    assert "4, 1 of them computed" in words
    assert "floor on H200" in words


def test_published_models_are_outlined_without_weights_or_network():
    dev, schnell = (outline_model(name) for name in ("flux", "black-forest-labs/FLUX.1-schnell"))
    assert dev.spec.name == "flux"
    assert schnell.spec.source == schnell.spec.name == "black-forest-labs/FLUX.1-schnell"
    assert (dev.block, "guidance" in dev.io.conditions) == ("single_transformer_blocks.37", True)
    assert "guidance" not in schnell.io.conditions
    with pytest.raises(ModelUnavailableError, match="only the configuration was given"):
        dev.stored.shards.read("proj_out.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flx"], "unknown model 'flx'. Did you mean 'flux'? Known:"),
        (["someone/else"], "unknown model 'someone/else'"),
        (["flux", "--gpu", "GTX"], "unknown GPU 'GTX'. Known: A100, B200, H100"),
        (["flux", "--height", "1000"], "height is 1000; flux takes multiples of 16 pixels"),
        (["flux", "--budget", "51"], "budget is 51"),
        (["flux", "--steps", "0"], "steps is 0"),
        (["flux", "--schedule", "search"], "schedule is search, for which a method is needed: give --budget"),
        (["flux", "--schedule", "0,1,51"], "schedule computes step 51"),
        (["flux", "--batch", "0"], "batch is 0"),
        (["flux", "--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments, message):
    code, output = run_cli("plan", *arguments)
    assert code == InputError.exit_code
    assert message in output


def test_a_configuration_that_is_not_there_is_named(thin):
    shutil.rmtree(thin / "transformer")
    code, output = run_cli("plan", thin, *SMALL)
    assert code == ModelUnavailableError.exit_code
    assert "thin is incomplete: " in output
