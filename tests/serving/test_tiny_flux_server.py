"""``cachec serve`` as a process of its own, with tiny-flux and without torch, asked by OpenAI's client."""

import base64
import signal
import subprocess
import sys

import openai
import pytest
from toy_product import succeed

import cachec

PROMPT = "a laughing face with short blue hair in a red tee on a yellow background"
OTHER = "a sad person with no hair in a white jacket on a navy background"
WITHOUT = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx"):
    sys.modules[name] = None
from cachec.cli import start
start()
"""


@pytest.fixture(scope="module")
def bundle(once):
    return once("pictures.cachec", lambda out: succeed("compile", "tiny-flux", "--method", "reuse", "--budget", "3", "-o", out))


@pytest.mark.slow
def test_the_openai_client_gets_the_generators_pictures_and_sigterm_ends_it_well(bundle):
    command = [sys.executable, "-c", WITHOUT, "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            name, url = server.stdout.readline().removeprefix("serving ").strip().split(" on ")
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
                made = client.images.generate(prompt=PROMPT, n=2, response_format="b64_json", extra_body={"seed": 3})
                events = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, quality="exact")
                kinds = {event.type for event in events}
                first = base64.b64decode(made.data[0].b64_json)
                edited = client.images.edit(image=("a.png", first), prompt=OTHER, extra_body={"seed": 5, "strength": 0.4})
        finally:
            server.send_signal(signal.SIGTERM)
    assert (name, server.returncode) == ("pictures", 0)
    assert {"image_generation.partial_image", "image_generation.completed"} < kinds
    with cachec.load(bundle) as loaded:
        wanted = loaded.generate([PROMPT] * 2, seeds=[3, 4])
        files = [loaded.generator.to_png(picture) for picture in wanted]
        changed = loaded.generate([OTHER], seeds=[5], pictures=wanted[:1], strength=0.4)
        files.append(loaded.generator.to_png(changed[0]))
    assert [base64.b64decode(one.b64_json) for one in (*made.data, *edited.data)] == files
