"""LinCa against its recursion written out, its training, and the import of released weights."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from toy_linca import CHANNELS, SPLIT, fitted, random_net
from toy_tables import SCHEDULES, SETTINGS, coded

from cachec.compiler.methods.linca import LinCa
from cachec.compiler.methods.linca_net import shapes_of
from cachec.compiler.methods.linca_training import train_linca
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError


@torch.no_grad()
def test_the_network_undoes_itself_and_is_the_released_formula():
    net, x = random_net(0), torch.randn(2, 3, CHANNELS)
    torch.testing.assert_close(net.inverse(net(x)), x, atol=1e-5, rtol=1e-5)
    wanted = x
    for block in net.blocks:
        mixed = torch.nn.functional.linear(wanted, block.conv1x1.weight.t())
        a, b = mixed[..., :4], mixed[..., 4:]
        a = a + block.revnet.scale_F * block.revnet.F(b)
        wanted = torch.cat([a, b + block.revnet.scale_G * block.revnet.G(a)], -1)
    torch.testing.assert_close(net(x), wanted)


def released(nets, lengths, features, schedule, step):
    """The released code at one step: the codes of the last three computed steps by the network of the step's segment."""
    net = nets[int((np.cumsum(lengths) <= step).sum())]
    at = [computed for computed in schedule.compute if computed < step][-3:][::-1]
    codes = [net(torch.from_numpy(features[s]).float()) for s in at]
    out, k, sigma, begin = [], step - at[0], 0.71, 0
    for order, width in enumerate(SPLIT):
        values = [code[..., begin : begin + width] for code in codes]
        forecast, begin = values[0], begin + width
        if order >= 1 and len(at) > 1:
            first = (values[0] - values[1]) / (at[0] - at[1])
            forecast = forecast + 2 * sigma**2 * k * first
        if order >= 2 and len(at) > 2:
            second = (first - (values[1] - values[2]) / (at[1] - at[2])) / (at[0] - at[1])
            forecast = forecast + (2 * sigma**4 * k**2 - sigma**2) * second
        out.append(forecast)
    return net.inverse(torch.cat(out, -1)).numpy()


@pytest.mark.parametrize(("name", "lengths"), [("interval 2 of 10", [10]), ("irregular", [7, 7, 6]), ("no warm-up", [6, 6])])
@torch.no_grad()
def test_it_is_the_released_recursion(name, lengths):
    schedule, nets = SCHEDULES[name], [random_net(seed) for seed in range(len(lengths))]
    features = np.random.default_rng(0).standard_normal((schedule.num_steps, 3, CHANNELS))
    for step, got in coded(LinCa(segments=len(lengths)), fitted(nets, lengths), features, schedule).items():
        np.testing.assert_allclose(got, released(nets, lengths, features, schedule, step), atol=1e-3, rtol=1e-3)


def trajectories(prompts, seed):
    generator, time = np.random.default_rng(seed), np.linspace(0, 1, 20)
    waves = np.stack([np.ones(20), time, time**2, np.sin(3 * time)])  # [4, T]
    mixing = np.random.default_rng(9).standard_normal((4, CHANNELS))
    parts = generator.standard_normal((prompts, 4, 5))
    return np.einsum("pwn,wt,wd->ptnd", parts, waves, mixing).astype(np.float32)


def data_of():
    train, held_out = (SimpleNamespace(features=trajectories(n, seed)) for n, seed in ((6, 0), (2, 1)))
    schedule = Schedule(20, (0, 1, 2, 7, 12, 17))
    evaluator = SimpleNamespace(device="cpu")
    return SimpleNamespace(train=train, held_out=held_out, schedule=schedule, seed=0, evaluator=evaluator, work=Path())


def test_training_lowers_the_loss_on_held_out_runs_and_a_trained_one_is_taken():
    method = LinCa(updates=60, segments=2, hidden=8, linear=0.25, curved=0.25, rate=3e-3)
    arrays, facts = train_linca(data_of(), method)
    for losses in facts["held_out_loss"].split(", "):
        before, after = map(float, losses.split(" to "))
        assert after < 0.9 * before
    parameters = Parameters(arrays, facts, "a test")
    assert method.coding((5, CHANNELS), SETTINGS, parameters).groups.sizes == (4, 2, 2, 4, 2, 2, 1, 1)
    with pytest.raises(PredictorError, match=r"segments of \[10, 10\] steps, and the schedule has 30"):
        method.table(Schedule(30, (0, 1)), np.zeros(31), parameters)
    with pytest.raises(PredictorError, match=r"linca's channels \[4, 2, 2\] are not the 16 of a feature"):
        method.coding((5, 16), SETTINGS, parameters)


def file_of(path, net, **changed):
    state = {f"net.{name}": value.numpy() for name, value in net.state_dict().items()}
    inverse = {"net.blocks.0.conv1x1.weight_inv": np.eye(CHANNELS, dtype=np.float32)}  # the released files hold it, too
    state |= inverse | changed
    save_file({name: np.asarray(value, order="C") for name, value in state.items() if value is not None}, path)
    return path


def test_released_weights_are_read_by_segment(tmp_path):
    nets = [random_net(seed) for seed in range(2)]
    files = [file_of(tmp_path / f"stage{i}.safetensors", net) for i, net in enumerate(nets)]
    found = LinCa.read_released(files, {"split": "5,2,1", "segments": "7,5"})
    assert (found.license, found.facts["steps"]) == ("Apache-2.0", "12")
    coding = LinCa().coding((3, CHANNELS), SETTINGS, Parameters(found.arrays, found.facts, "them"))
    x = torch.randn(1, 3, CHANNELS)
    torch.testing.assert_close(coding.encode(x)[..., CHANNELS : 2 * CHANNELS], nets[1](x))
    own = {f"net.{name}": tuple(value.shape) for name, value in nets[0].state_dict().items()}
    assert shapes_of(CHANNELS, 2, 6) == own


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"net.blocks.0.revnet.scale_F": None}, {}, "net.blocks.0.revnet.scale_F is missing"),
        ({"net.blocks.0.gate": np.zeros(1, np.float32)}, {}, "net.blocks.0.gate is surplus"),
        ({"net.blocks.x.gate": np.zeros(1, np.float32)}, {}, "net.blocks.x.gate is surplus|is missing"),
        ({}, {"split": "5,2,3"}, r"net.blocks.0.conv1x1.weight is \[8, 8\], expected \[10, 10\]"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, changed, options, message):
    path = file_of(tmp_path / "x", random_net(0), **changed)
    with pytest.raises(PredictorError, match=message):
        LinCa.read_released([path], {"split": "5,2,1", "segments": "12", **options})


def test_options_that_are_missing_or_wrong_are_refused(tmp_path):
    with pytest.raises(InputError, match="import linca needs --set split=N,N,N of whole numbers, got nothing"):
        LinCa.read_released([], {})
    with pytest.raises(InputError, match="1 files are given for segments"):
        LinCa.read_released([tmp_path], {"split": "5,2,1", "segments": "7,5"})
    with pytest.raises(InputError, match=r"8 channels cannot be parted into \(8, 0, 0\)"):
        LinCa(linear=0.0, curved=0.0).split(8)
    for name in ("blocks", "hidden", "segments", "updates", "rate"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            LinCa(**{name: 0})
    with pytest.raises(InputError, match="shares of the channels"):
        LinCa(linear=0.9, curved=0.2)
