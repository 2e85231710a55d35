import pytest
import torch

from reference.avatars.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def test_matrices_of_one_shape_do_not_disturb_each_other():
    a, b = torch.randn(2, 6, 4)
    torch.testing.assert_close(orthogonal(torch.stack([a, b]))[1], orthogonal(b[None])[0])


def test_a_state_that_is_loaded_goes_on_as_if_never_stopped():
    def run(stop):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 6))
        optimizer = Muon([weight], 0.1)
        for step in range(4):
            if step == stop:
                saved, optimizer = optimizer.state_dict(), Muon([weight], 0.1)
                optimizer.load_state_dict(saved)
            weight.grad = weight.detach() * (step + 1)
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(run(stop=None), run(stop=2))


def test_a_step_is_a_fifth_of_the_rate_in_root_mean_square():
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    optimizer = Muon([weight], 0.1)
    weight.grad = torch.randn(32, 64)
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)
