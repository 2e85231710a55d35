import json
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch

from reference.avatars import autoencoder, muon
from reference.avatars.attributes import looks, vocabulary
from reference.avatars.flow import Plan, Trainer
from reference.avatars.latents import Latents
from reference.avatars.networks import pack
from reference.avatars.tiny_flux import TEXT_TOKENS, FluxLearner, PackedPictures, unpack


def folder(tmp_path, num=6):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures.rgb").write_bytes(rng.integers(0, 256, num * (128 * 128 * 3), np.uint8).tobytes())
    lines = [json.dumps({"look": asdict(look), "caption": "a"}) for look in islice(looks(1, held_out=False), num)]
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    vae = autoencoder.build_autoencoder()
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path


def test_tokens_are_unpacked_to_what_was_packed():
    latents = torch.randn(2, 16, 16, 16)
    torch.testing.assert_close(unpack(pack(latents)), latents)


def test_latents_are_encoded_once_and_kept(tmp_path):
    latents = Latents("pictures", folder(tmp_path))
    found = latents.take(np.array([1, 3]))
    latents.vae = None
    torch.testing.assert_close(latents.take(np.array([3])), found[1:])
    again = Latents("pictures", tmp_path)
    again.vae = None
    torch.testing.assert_close(again.take(np.array([1])), found[:1])


def test_an_update_of_flux_on_cached_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "orthogonal", torch.sign)  # the costly part, which has tests of its own
    learner = FluxLearner()
    trainer = Trainer(learner, PackedPictures(Latents("pictures", folder(tmp_path))), Plan("small", tmp_path, 10, 2))
    before = trainer.network.proj_out.weight.clone()
    assert np.isfinite(trainer.update(0))
    assert not torch.equal(trainer.network.proj_out.weight, before)


def test_captions_are_told_apart_and_their_words_in_order():
    states = FluxLearner().encode(["a red jacket on a blue background", "a blue jacket on a red background", ""])
    text = states["encoder_hidden_states"]
    assert text.shape == (3, TEXT_TOKENS, 64)
    assert (text[0].mean(0) - text[1].mean(0)).norm() > 0.05 * (text[0].mean(0) - text[2].mean(0)).norm()
    assert states["pooled_projections"].shape == (3, 64)
    assert len(set(vocabulary())) == len(vocabulary())
