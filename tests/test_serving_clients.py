"""Other people's clients, unchanged, against a real server. Each is skipped where it is not installed:

pip install openai tei-client "tritonclient[http]" open-inference-openapi
"""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import answers, write_adapter
from bases import write_base
from servers import ADMIN, READER, TOKENS, Server, bearer, start

LABELS = {"reviews": ("neg", "pos"), "topics": ("sport", "film", "other")}
TEXTS = ["a great film", "差评 boring"]


@pytest.fixture(scope="module")
def probabilities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the adapters, and what peft alone says of the texts: float[n, C] by the adapter's name."""
    folder, found = tmp_path_factory.mktemp("clients"), {}
    write_base(folder / "base", "bert")
    for seed, (name, labels) in enumerate(LABELS.items()):
        model = write_adapter(folder / "adapters" / name, folder / "base", seed=seed, labels=labels)
        powers = np.exp(answers(model, TEXTS, folder / "base"))
        found[name] = powers / powers.sum(1, keepdims=True)
    return folder, found


@pytest.fixture(scope="module")
def server(probabilities: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with tokens, over a directory of its own."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(probabilities[0] / "adapters", folder / "adapters")
    (folder / "tokens.toml").write_text(TOKENS, "utf-8")
    server = start("--adapter-dir", str(folder / "adapters"), "--tokens", str(folder / "tokens.toml"))
    yield server
    assert server.stop() == 0


# Clients are asked for before the server, so that none is started for nobody.


@pytest.fixture(scope="module")
def openai() -> Any:
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def tei() -> Any:
    return pytest.importorskip("tei_client")


@pytest.fixture(scope="module")
def triton() -> Any:
    return pytest.importorskip("tritonclient.http")


@pytest.fixture(scope="module")
def protocol() -> Any:
    pytest.importorskip("httpx")
    return pytest.importorskip("open_inference.openapi.client")


def test_openai_lists_models(openai: Any, server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ADMIN, max_retries=0)
    assert [model.id for model in client.models.list()] == ["reviews", "topics"]
    model = client.models.retrieve("topics")
    assert (model.id, model.object, model.owned_by) == ("topics", "model", "trimtab")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    reader = openai.OpenAI(base_url=f"{server.url}/v1", api_key=READER, max_retries=0)
    assert [model.id for model in reader.models.list()] == ["reviews"]
    with pytest.raises(openai.PermissionDeniedError):
        reader.models.retrieve("topics")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_client_of_tei_classifies(tei: Any, server: Server, probabilities: tuple[Path, dict[str, Any]]) -> None:
    client = tei.HttpClient(f"{server.url}/a/topics", headers=bearer(ADMIN))
    assert client.health()
    for found in (client.classify(TEXTS), asyncio.run(client.async_classify(TEXTS))):
        for result, row in zip(found, probabilities[1]["topics"], strict=True):
            scores = {one.label: one.score for one in result.scores}
            assert scores == pytest.approx(dict(zip(LABELS["topics"], row, strict=True)), abs=1e-4)
    assert len(client.classify(TEXTS[0], raw_scores=True)[0].scores) == 3
    info = client.info()
    assert (info.server_model_type.value, info.max_client_batch_size) == ("classifier", 256)
    assert info.server_model_metadata.id2label == {str(i): label for i, label in enumerate(LABELS["topics"])}
    assert info.server_model_metadata.label2id == {label: i for i, label in enumerate(LABELS["topics"])}
    everything = tei.HttpClient(server.url, headers=bearer(ADMIN)).info()
    assert everything.server_model_metadata.id2label == {}


def test_tritons_client(triton: Any, server: Server, probabilities: tuple[Path, dict[str, Any]]) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata(headers=bearer(ADMIN))["name"] == "trimtab"
    assert client.is_model_ready("topics", headers=bearer(ADMIN))
    assert not client.is_model_ready("nobody", headers=bearer(ADMIN))
    metadata = client.get_model_metadata("topics", headers=bearer(ADMIN))
    assert [one["name"] for one in metadata["outputs"]] == ["label", "score", "probs"]
    wanted = probabilities[1]["topics"]
    for shape in ([2], [2, 1]):
        text = triton.InferInput(metadata["inputs"][0]["name"], shape, "BYTES")
        text.set_data_from_numpy(np.array(TEXTS, object).reshape(shape), binary_data=False)
        for binary in (False, True):  # JSON comes where binary is asked for, and the client reads it
            outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probs")]
            for asked in (outputs, None):
                found = client.infer("topics", [text], outputs=asked, headers=bearer(ADMIN), request_id="7")
                assert found.as_numpy("probs") == pytest.approx(wanted, abs=1e-4)
                assert found.as_numpy("label").tolist() == [LABELS["topics"][i] for i in wanted.argmax(1)]
                assert found.get_response()["id"] == "7"
    waiting = [client.async_infer("topics", [text], headers=bearer(ADMIN)) for _ in range(4)]
    assert all(one.get_result().as_numpy("probs") == pytest.approx(wanted, abs=1e-4) for one in waiting)
    text.set_data_from_numpy(np.array(TEXTS, object).reshape(2, 1), binary_data=True)
    with pytest.raises(triton.InferenceServerException, match="binary_data=False"):
        client.infer("topics", [text], headers=bearer(ADMIN))
    client.close()


def test_a_client_made_from_the_open_inference_protocol(
    protocol: Any, server: Server, probabilities: tuple[Path, dict[str, Any]]
) -> None:
    import httpx
    from open_inference.openapi import types

    client = protocol.OpenInferenceClient(base_url=server.url, httpx_client=httpx.Client(headers=bearer(ADMIN)))
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness("reviews")
    assert client.read_server_metadata().name == "trimtab"
    tensor = types.RequestInput(name="text", shape=[2], datatype="BYTES", data=TEXTS)
    found = client.model_infer("reviews", request=types.InferenceRequest(inputs=[tensor]))
    outputs = {one.name: one for one in found.outputs}
    assert outputs["probs"].data.__root__ == pytest.approx(probabilities[1]["reviews"].ravel().tolist(), abs=1e-4)
    metadata = client.read_model_metadata("reviews")
    assert metadata.versions == [found.model_version]
    assert metadata.outputs[2].shape == [-1, 2]
