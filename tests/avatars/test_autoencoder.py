import numpy as np
import pytest
import torch

from reference.avatars.autoencoder import Trainer, build_autoencoder, pass_on, psnr, reconstruct, to_input, to_pictures


def test_pictures_survive_the_way_to_the_network_and_back():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(to_pictures(to_input(pictures)), pictures)


def test_psnr_is_in_decibels_and_the_mean_over_pictures():
    real = np.zeros((2, 4, 4, 3), np.uint8)
    found = real + np.array([255, 51], np.uint8)[:, None, None, None]  # errors of 1 and of 0.2
    assert psnr(found, real) == pytest.approx(-10 * np.log10(0.04) / 2, rel=1e-5)


def test_the_autoencoder_is_small_and_shrinks_eightfold():
    vae = build_autoencoder()
    assert sum(p.numel() for p in vae.parameters()) * 2 < 4e6  # bytes of float16
    assert vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode().shape == (1, 16, 4, 4)


def test_at_the_start_colours_pass_through_the_encoder():
    vae = build_autoencoder()
    pass_on(vae)
    red, green = torch.zeros(2, 1, 3, 32, 32)
    red[:, 0], green[:, 1] = 1, 1
    seen = [vae.encode(x).latent_dist.mode()[..., 1:3, 1:3] for x in (red, green)]
    assert (seen[0] - seen[1]).abs().mean() > 0.1 * seen[0].abs().mean()


def test_a_few_updates_lower_the_loss():
    torch.manual_seed(0)
    picture = np.full((1, 128, 128, 3), (200, 40, 90), np.uint8)
    trainer = Trainer(picture, steps=60, batch=1)
    losses = [trainer.update(step) for step in range(5)]
    assert losses[-1] < losses[0]
    assert reconstruct(trainer.vae, picture).shape == (1, 128, 128, 3)
