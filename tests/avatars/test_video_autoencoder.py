import numpy as np
import torch
from torch import nn

from reference.avatars import autoencoder
from reference.avatars.video_autoencoder import Trainer, build_autoencoder, inflate, to_frames, to_video


def picture_autoencoder():
    torch.manual_seed(0)
    vae = autoencoder.build_autoencoder()
    autoencoder.pass_on(vae)
    return vae


def test_frames_survive_the_way_to_the_network_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(to_frames(to_video(frames)), frames)


def test_an_inflated_autoencoder_takes_every_weight_and_shows_the_same_still():
    picture, video = picture_autoencoder(), build_autoencoder()
    inflate(video, picture)
    carried = sum(parameter.count_nonzero() for parameter in video.parameters())
    own = 32 + 16  # the two convolutions around the latents pass them on
    assert carried == sum(parameter.count_nonzero() for parameter in picture.parameters()) + own
    still = torch.rand(1, 3, 1, 1) * torch.ones(1, 3, 64, 64)
    flat = picture.decoder(torch.randn(1, 16, 1, 1).expand(1, 16, 8, 8))
    deep = video.decoder(torch.randn(1, 16, 1, 1, 1).expand(1, 16, 1, 8, 8))
    assert flat.shape == deep[:, :, 0].shape
    seen = video.encode(still[:, :, None].expand(1, 3, 9, 64, 64)).latent_dist.mode()
    inner = (..., slice(3, 5), slice(3, 5))  # borders are padded in another way
    expected = picture.encode(still).latent_dist.mode()[inner]
    torch.testing.assert_close(seen[:, :, -1][inner], expected, rtol=0.3, atol=0.1)


def trained_once(*, decoder_only):
    clips = np.random.default_rng(1).integers(0, 256, (1, 9, 96, 96, 3), np.uint8)
    video = build_autoencoder()
    inflate(video, picture_autoencoder())
    trainer = Trainer(clips, video, steps=10, batch=1, decoder_only=decoder_only)
    begun = {name: value.clone() for name, value in video.state_dict().items()}
    assert np.isfinite(trainer.update(0))
    return trainer.vae, {name for name, value in video.state_dict().items() if not torch.equal(value, begun[name])}


def test_an_update_moves_the_taps_of_other_frames():
    vae, _ = trained_once(decoder_only=False)
    first = next(module for module in vae.modules() if isinstance(module, nn.Conv3d))
    assert first.weight[:, :, 0].abs().max() > 0


def test_an_update_of_the_decoder_alone_leaves_the_latents():
    _, moved = trained_once(decoder_only=True)
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
