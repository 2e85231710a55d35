"""The server on a local Ray of two workers: the same pictures, also when one of the two is killed on the way."""

import asyncio
import base64
import io
import json
import os
import socket
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_product import run_cli
from toy_server import ToyEncoder, form, running, toy_served

from cachec.runtime.errors import EngineError, InputError
from cachec.serving.hosted import Asked
from cachec.serving.limits import Limits

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def port():
    """Of a server with two replicas, either of which has one bundle open at a time."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # of machines at work
    from ray import serve

    from cachec.serving.ray import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    ray.init(address="local", num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            app({"bundles": "one,org/two=two", "replicas": 2, "opener": "toy_server:open_toy", "limits": {"seconds": 120}})
        )
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(port, path, body=None, kind="application/json"):
    connection = HTTPConnection("127.0.0.1", port, timeout=150)
    connection.request("GET" if body is None else "POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, json.loads(data) if answer.headers["content-type"].startswith("application/json") else data


def generate(port, seed, **fields):
    return ask(port, "/v1/images/generations", json.dumps({"prompt": "a ring", "seed": seed, "quality": "exact", **fields}))


@pytest.fixture(scope="module")
def alone():
    """What one process gives, by seed."""
    with running(toy_served()) as server:
        return {seed: server.generate("a ring", seed=seed, quality="exact")[1]["data"][0]["b64_json"] for seed in range(12)}


def test_results_are_those_of_one_process(port, alone):
    status, data = generate(port, 3)
    assert (status, data["data"][0]["b64_json"], data["model"]) == (200, alone[3], "one")
    status, data = generate(port, 3, model="org/two", n=2)
    assert (status, [one["b64_json"] for one in data["data"]], data["model"]) == (200, [alone[3], alone[4]], "org/two")
    status, text = generate(port, 5, stream=True)
    last = json.loads(text.decode().strip().rpartition("data: ")[2])
    assert (status, base64.b64decode(last["b64_json"])) == (200, base64.b64decode(alone[5]))
    assert text.decode().count("event: image_generation.progress") == 8
    assert [one["id"] for one in ask(port, "/v1/models")[1]["data"]] == ["one", "org/two"]


def edit_fields(**fields):
    """Those of a form with a picture."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)).save(picture, "PNG")
    return {"image": picture.getvalue(), "prompt": "a ring", "seed": "3", "strength": "0.5", **fields}


def edit(port, **fields):
    return ask(port, "/v1/images/edits", *form(edit_fields(**fields).items()))


def test_a_picture_to_begin_with_is_taken(port):
    with running(toy_served(pictures=ToyEncoder, strengths=(0.5,))) as server:
        wanted = edit(server.port)[1]["data"][0]["b64_json"]
    for model in ("one", "org/two"):
        status, data = edit(port, model=model)
        assert (status, data["data"][0]["b64_json"], data["model"]) == (200, wanted, model)
    assert edit(port, model="three")[0] == 404
    assert edit(port, strength="0.7")[0] == 400


def test_what_does_not_fit_is_told_in_words(port):
    assert generate(port, 1, model="three")[0] == 404
    status, data = generate(port, 1, num_inference_steps=5)
    assert (status, "the bundle was compiled for 8, 4" in data["error"]["message"]) == (400, True)
    assert generate(port, 1, response_format="url")[0] == 400
    assert ask(port, "/v1/videos", '{"prompt": "a"}')[0] == 400
    assert ask(port, "/health") == (200, {"status": "ok"})


def test_killed_replicas_lose_no_request(port, alone):
    generate(port, 0)  # so that the bundle is open
    answers = {}

    def one(seed):
        answers[seed] = generate(port, seed)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)  # a request takes longer
    assert not answers
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "cachec-replica" in one["name"]]
    assert len(names) == 2
    for name in names:  # whichever of them has them
        ray.kill(ray.get_actor(name, namespace="serve"))
    for thread in threads:
        thread.join(150)
    assert {seed: answer[0] for seed, answer in answers.items()} == dict.fromkeys(range(12), 200)
    assert {seed: answer[1]["data"][0]["b64_json"] for seed, answer in answers.items()} == alone


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "there is nothing to serve"),
        ({"bundles": "a", "gpu": 1}, "unknown argument 'gpu'. Did you mean 'gpus'"),
        ({"bundles": "a", "replicas": "4-2"}, "replicas is 4-2; write a number, or two as in 0-4"),
        ({"bundles": "a", "limits": {"queue": -1}}, "the limit queue is -1"),
        ({"bundles": "x/a.cachec,y/a"}, "two bundles are called a"),
    ],
)
def test_what_cannot_be_deployed_is_refused(args, message):
    from cachec.serving.ray import app

    with pytest.raises(InputError, match=message):
        app(args)


@pytest.mark.parametrize(("given", "made", "refused"), [((), "0.6", "0.3"), (("--strengths", "0.25"), "0.25", "0.6")], ids=str)
def test_what_the_command_is_told_reaches_the_replicas(tmp_path, monkeypatch, given, made, refused):
    """All but the cluster is real: the command, what it deploys, and a replica of it in this process."""
    from cachec.serving import ray as on_ray

    deployed = []
    monkeypatch.setattr(on_ray, "run_on_ray", lambda args, **where: deployed.append((args, where)))
    more = ("--policy", "fifo", "--lanes", 3, "--port", 1, "--replicas", "0-4", "--max-queue", 5)
    code, output = run_cli("serve", f"org/one={tmp_path}/one.cachec", "--ray", *given, *more)
    assert code == 0, output
    ((args, where),) = deployed
    plan = on_ray.Plan.from_args({**args, "opener": "toy_server:open_toy"})
    assert (where["host"], where["port"], plan.replicas, plan.limits.queue) == ("127.0.0.1", 1, "0-4", 5)

    async def ask():
        bundle = await on_ray.Replica(plan).hosted("org/one")
        forms = [form(edit_fields(strength=one).items()) for one in (made, refused)]
        found = [await answered(bundle, "/v1/images/edits", *one) for one in forms]
        await bundle.close()
        return found, bundle.app.state.desk.served["org/one"].num_lanes

    assert asyncio.run(ask()) == ([200, 400], 3)


def test_a_directory_with_a_sign_in_its_name_is_called_so_on_ray_too(tmp_path, monkeypatch):
    from cachec.serving import ray as on_ray

    deployed = []
    monkeypatch.setattr(on_ray, "run_on_ray", lambda args, **where: deployed.append(on_ray.Plan.from_args(args).names))
    (tmp_path / "rate=1").mkdir()
    code, output = run_cli("serve", tmp_path / "rate=1", f"other={tmp_path / 'rate=1'}", "--ray")
    assert (code, deployed) == (0, [{"rate=1": f"{tmp_path}/rate=1", "other": f"other={tmp_path}/rate=1"}]), output


async def answered(bundle, path, body, kind):
    """The status that a bundle of a replica answers with."""
    return (await anext(bundle.call(Asked("POST", path, b"", [(b"content-type", kind.encode())], body))))["status"]


def test_a_replica_whose_engines_fail_request_after_request_tells_ray():
    from cachec.serving.health import IN_A_ROW
    from cachec.serving.ray import Plan, Replica

    async def ask():
        replica = Replica(Plan(["one"], opener="toy_server:open_failing"))
        bundle = await replica.hosted("one")
        for _ in range(IN_A_ROW):
            replica.check_health()
            assert await answered(bundle, "/v1/images/generations", b'{"prompt": "a"}', "application/json") == 500
        with pytest.raises(EngineError, match="cudaErrorNoDevice"):
            replica.check_health()
        await bundle.close()

    asyncio.run(ask())


def test_a_key_that_is_wanted_and_did_not_come_is_an_error(monkeypatch):
    from cachec.serving.ray import Ingress, Plan

    monkeypatch.delenv("CACHEC_API_KEY", raising=False)
    with pytest.raises(InputError, match="the API key did not reach this machine"):
        Ingress(Plan(["one"], keyed=True), None)


DEPLOY = Path(__file__).parent.parent.parent / "docs" / "deploy.md"


@pytest.mark.skipif(not DEPLOY.is_file(), reason="the source tree is not beside the tests")
def test_the_manifest_in_the_docs_deploys():
    import yaml

    from cachec.serving.ray import Plan

    manifest = yaml.safe_load(DEPLOY.read_text().partition("```yaml\n")[2].partition("```")[0])
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    plan = Plan.from_args(application["args"])
    assert application["import_path"] == "cachec.serving.ray:app"
    assert (list(plan.names), plan.limits.queue) == (["flux", "qwen"], 64)
    assert plan.scaling == {"autoscaling_config": {"min_replicas": 0, "max_replicas": 4, "target_ongoing_requests": 8}}
    mounts = [group["template"]["spec"]["containers"][0]["volumeMounts"] for group in groups(manifest["spec"])]
    assert [one[0]["mountPath"] for one in mounts] == ["/bundles", "/bundles"]


def groups(spec):
    config = spec["rayClusterConfig"]
    return [config["headGroupSpec"], *config["workerGroupSpecs"]]


class Stream:
    """What a replica sends; an error among it is its death."""

    def __init__(self, messages):
        self._messages, self.cancelled = iter(messages), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        for message in self._messages:
            if isinstance(message, Exception):
                raise message
            return message
        raise StopAsyncIteration

    def cancel(self):
        self.cancelled = True


class Replicas:
    """A handle whose next replica sends the next of these."""

    def __init__(self, *streams):
        self._streams, self.asked = list(map(Stream, streams)), 0
        self.answer = self

    def options(self, **given):
        assert given == {"stream": True, "multiplexed_model_id": "one"}
        return self

    def remote(self, asked):
        self.asked += 1
        return self._streams[self.asked - 1]


def answers(*streams, seconds=60.0):
    """What the ingress sends on, and how many replicas it asked."""
    from cachec.serving.ray import Ingress, Plan

    replicas = Replicas(*streams)

    async def collect():
        ingress = Ingress(Plan(["one"], limits=Limits(seconds=seconds)), replicas)
        return [message async for message in ingress._messages("one", None)]

    return asyncio.run(collect()), replicas.asked


def head(status, kind=b"application/json"):
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def body(data):
    return {"type": "http.response.body", "body": data}


def test_what_a_dead_or_stopping_replica_said_is_not_sent_on():
    from ray.exceptions import ActorDiedError

    good = [head(200), body(b"{}")]
    found = answers([ActorDiedError()], [head(200), ActorDiedError()], [head(503), body(b"stopping")], good)
    assert found == (good, 4)
    stopping = [head(503), body(b"stopping")]
    assert answers(stopping, stopping, seconds=0.001)[0] == stopping
    with pytest.raises(ActorDiedError):
        answers([ActorDiedError()], [ActorDiedError()], seconds=0.001)


def test_events_go_on_from_another_replica():
    from ray.exceptions import ActorDiedError

    events = head(200, b"text/event-stream; charset=utf-8")
    found, asked = answers([events, body(b"1"), ActorDiedError()], [events, body(b"1"), body(b"2")])
    assert (found, asked) == ([events, body(b"1"), body(b"1"), body(b"2")], 2)
    found, _ = answers([events, ActorDiedError()], [head(400), body(b"{}"), body(b"")])
    assert found == [events, body(b"event: error\ndata: {}\n\n"), body(b"")]
