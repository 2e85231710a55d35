from dataclasses import replace

import pytest
from toy_bundle import STEPS
from toy_model import SETTINGS, ToyModel

import cachec


@pytest.fixture(scope="package")
def loaded(toy_bundle):
    """The toy's bundle, as of the toy's family with its sizes in pixels."""
    with cachec.load(toy_bundle) as loaded:
        manifest = loaded.manifest
        model = {**manifest.model, "weights_sha256": ToyModel().weights_hash}
        settings = {**manifest.settings, **vars(SETTINGS), "steps": STEPS}
        yield replace(loaded, manifest=replace(manifest, model=model, settings=settings))
