"""The server as others meet it: a process of its own, real sockets, and the clients of each family unchanged."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from adapters import answers, write_adapter
from bases import write_base
from pydantic import BaseModel, ValidationError
from servers import ADMIN, READER, TOKENS, Server, bearer
from servers import start as start_server

from trimtab.serving import formats
from trimtab.serving.guard import PUBLIC

TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}

TEXTS = ["a great film", "boring", "the plot is not very good " * 9, "an awful film"]
start = partial(start_server, "--set", "runtime.dtype=float32")  # as peft, to compare numbers
LABELS = {"reviews": ("neg", "pos"), "topics": ("sport", "film", "other")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder with base/, adapters/ and spare/, and peft's models by the adapter's name."""
    folder = tmp_path_factory.mktemp("http")
    write_base(folder / "base", "bert")
    models = {
        name: write_adapter(folder / "adapters" / name, folder / "base", seed=seed, labels=labels, temperature=1.5)
        for seed, (name, labels) in enumerate(LABELS.items())
    }
    models["spare"] = write_adapter(folder / "spare", folder / "base", seed=9)
    return folder, models


@pytest.fixture(scope="module")
def server(made: tuple[Path, dict[str, Any]]) -> Iterator[Server]:
    server = start("--adapter-dir", str(made[0] / "adapters"), "--watch", "0")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def guarded(made: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with tokens and admin routes, over a directory of its own that it watches."""
    folder = tmp_path_factory.mktemp("guarded")
    shutil.copytree(made[0] / "adapters", folder / "adapters")
    (folder / "tokens.toml").write_text(TOKENS, "utf-8")
    server = start(
        *("--adapter-dir", str(folder / "adapters"), "--watch", "0.2", "--admin"),
        *("--tokens", str(folder / "tokens.toml")),
    )
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def alone(made: tuple[Path, dict[str, Any]]) -> Iterator[Server]:
    """A server with one adapter."""
    server = start(str(made[0] / "adapters" / "reviews"))
    yield server
    assert server.stop() == 0


def expected(made: tuple[Path, dict[str, Any]], name: str, texts: list[str], temperature: float = 1.5) -> Any:
    """What peft alone says, as probabilities float[n, C]."""
    logits = answers(made[1][name], texts, made[0] / "base") / temperature
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def check(scores: list[dict[str, Any]], probabilities: Any, labels: tuple[str, ...]) -> None:
    """TEI's scores of one text: sorted downwards, by training label."""
    found = {one["label"]: one["score"] for one in scores}
    assert found == pytest.approx(dict(zip(labels, probabilities, strict=True)), abs=1e-4)
    assert [one["score"] for one in scores] == sorted(found.values(), reverse=True)


# -- TEI


def test_tei_one_text_and_batches(server: Server, made: tuple[Path, dict[str, Any]]) -> None:
    wanted = expected(made, "reviews", TEXTS)
    for inputs in ("a great film", ["a great film"]):
        check(server.predict({"inputs": inputs, "model": "reviews"}), wanted[0], LABELS["reviews"])
    found = server.predict({"inputs": [[text] for text in TEXTS], "model": "reviews"})
    for scores, row in zip(found, wanted, strict=True):
        check(scores, row, LABELS["reviews"])


def test_one_batch_of_many_adapters_and_the_answer_names_them(
    server: Server, made: tuple[Path, dict[str, Any]]
) -> None:
    names = ["reviews", "topics", "topics", "reviews"]
    body = {"inputs": [[text] for text in TEXTS], "models": names}
    status, found, headers = server.ask("POST", "/predict", body)
    assert status == 200
    for scores, text, name in zip(found, TEXTS, names, strict=True):
        check(scores, expected(made, name, [text])[0], LABELS[name])
    assert headers["x-adapter"] == "reviews,topics,topics,reviews"
    assert [version[:2] for version in headers["x-adapter-version"].split(",")] == ["1-"] * 4
    assert headers["x-truncated"] == "1"


def test_raw_scores_top_k_and_truncate(server: Server, made: tuple[Path, dict[str, Any]]) -> None:
    logits = answers(made[1]["topics"], TEXTS[:1], made[0] / "base")[0]
    found = server.predict({"inputs": TEXTS[0], "model": "topics", "raw_scores": True})
    check(found, logits, LABELS["topics"])
    assert (
        server.predict({"inputs": TEXTS[0], "model": "topics", "top_k": 1})
        == (server.predict({"inputs": TEXTS[0], "model": "topics"})[:1])
    )
    status, found, _ = server.ask("POST", "/predict", {"inputs": TEXTS[2], "model": "topics", "truncate": False})
    assert (status, found["error_type"]) == (422, "validation")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"inputs": ["a", "b"], "model": "reviews"}, 422, '[["first"], ["second"]]'),
        ({"inputs": [["a", "b"]], "model": "reviews"}, 422, "alone in its list"),
        ({"inputs": [], "model": "reviews"}, 400, "no input"),
        ({"inputs": 7, "model": "reviews"}, 422, '[["first"], ["second"]]'),
        ({"model": "reviews"}, 422, "inputs"),
        ({"inputs": "a", "model": "nobody"}, 404, "nobody"),
        ({"inputs": "a", "model": "../reviews"}, 404, "no adapter"),
        ({"inputs": "a"}, 400, '"model" is missing, and there are 2 adapters'),
        ({"inputs": [["a"]], "models": ["reviews", "topics"]}, 422, "2 models for 1 inputs"),
        ({"inputs": [["a"]], "models": ["reviews"], "model": "reviews"}, 422, "leave `model` out"),
        ({"inputs": [["a"]] * 257, "model": "reviews"}, 422, "257 texts"),
        ({"inputs": "a" * 1_000_001, "model": "reviews"}, 422, "1,000,001 characters"),
        ({"inputs": "a", "model": "reviews", "truncation_direction": "left"}, 422, "as in training"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_reason(
    server: Server, body: object, status: int, said: str
) -> None:
    found, failure, _ = server.ask("POST", "/predict", body)
    assert (found, failure.keys()) == (status, {"error", "error_type", "code", "mend"})
    assert said in failure["error"]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b'{"inputs": "a", "model"', 422),
        (b'{"inputs": "\\ud800", "model": "reviews"}', 422),
        (b'{"inputs": NaN, "model": "reviews"}', 422),
        (b"[" * 200_000, 422),
        (b'{"inputs":' + b"[" * 5_000 + b"]" * 5_000 + b"}", 422),
        (b"\xff\xfe", 422),
        (b"", 422),
        (b'"' + b"a" * (10 << 20) + b'"', 413),
        (b'{"inputs": "a", "model": ' + b"9" * 5_000 + b"}", 422),
        (b'{"inputs": "a\\u0000b", "model": "reviews"}', 200),
    ],
)
def test_bodies_that_are_no_bodies(server: Server, raw: bytes, status: int) -> None:
    found, _, _ = server.ask("POST", "/predict", raw=raw)
    assert found in (status, 400) if status == 422 else found == status
    assert server.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (formats.PredictRequest, {"inputs": [1] * 1_000}),
        (formats.PredictRequest, {"inputs": [["a"], *[1] * 1_000]}),
        (formats.PredictRequest, {"inputs": [[1] * 1_000]}),
        (formats.PredictRequest, {"inputs": "a", "models": [1] * 1_000}),
        (formats.ClassifyRequest, {"input": [1] * 1_000}),
        (formats.InferRequest, {"inputs": [1] * 1_000}),
        (formats.InferRequest, {"inputs": [TENSOR | {"shape": [-1] * 1_000}]}),
        (formats.InferRequest, {"inputs": [TENSOR], "outputs": [1] * 1_000}),
    ],
)
def test_a_thousand_faults_of_a_body_are_not_all_collected(kind: type[BaseModel], body: object) -> None:
    with pytest.raises(ValidationError) as failure:
        kind.model_validate(body)
    assert failure.value.error_count() <= 3


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/predict", {"inputs": [["a"]] * 10_001, "model": "reviews"}, "texts: 10,001 are too many"),
        ("/predict", {"inputs": ["a"] * 190_000, "models": ["b"] * 190_000}, "texts: 190,000 are too many"),
        ("/predict", {"inputs": [["a"]], "models": ["b"] * 190_000}, "models: 190,000 are too many"),
        ("/a/reviews", {"inputs": [[]] * 500_000}, "texts: 500,000 are too many"),
        ("/v1/classify", {"input": ["a"] * 10_001, "model": "reviews"}, "texts: 10,001 are too many"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR | {"data": ["a"] * 10_001}]}, "texts: 10,001 are too many"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR], "outputs": [{"name": "a"}] * 101}, "outputs: "),
    ],
)
def test_a_flood_of_small_things_is_not_looked_at(server: Server, path: str, body: object, said: str) -> None:
    status, failure, _ = server.ask("POST", path, raw=json.dumps(body, separators=(",", ":")).encode())
    assert (status, failure["error"].startswith(said)) == (422, True), failure


HALF = "a\ud800b"
ONE = {"inputs": "a", "model": "reviews"}


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/predict", ONE | {"model": HALF}, "model"),
        ("/predict", {"inputs": [["a"]], "models": [HALF]}, "models.0"),
        ("/predict", ONE | {"truncation_direction": HALF}, "truncation_direction"),
        ("/v1/classify", {"input": "a", "model": HALF}, "model"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR | {"datatype": HALF}]}, "inputs.0.datatype"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR | {"name": HALF}]}, "inputs.0.name"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR], "id": HALF}, "id"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR], "outputs": [{"name": HALF}]}, "outputs.0.name"),
        ("/v2/models/reviews/infer", {"inputs": [TENSOR | {"data": [HALF]}]}, "Half a character"),
    ],
)
def test_half_a_character_anywhere_is_refused(server: Server, path: str, body: object, where: str) -> None:
    status, failure, _ = server.ask("POST", path, body)
    assert (status, failure["error"].startswith(where)) == (422, True), failure


def test_half_a_character_that_nobody_reads_is_no_fault(server: Server) -> None:
    odd = {HALF: HALF}
    assert server.ask("POST", "/predict", ONE | odd)[0] == 200
    body = {"inputs": [TENSOR | {"parameters": odd}], "parameters": odd} | odd
    assert server.ask("POST", "/v2/models/reviews/infer", body)[0] == 200


def test_the_only_adapter_needs_no_name(alone: Server, made: tuple[Path, dict[str, Any]]) -> None:
    check(alone.predict({"inputs": TEXTS[0]}), expected(made, "reviews", TEXTS[:1])[0], LABELS["reviews"])
    assert alone.ask("POST", "/v1/classify", {"input": "boring"})[0] == 200


@pytest.mark.parametrize("wrong", ["modle", "Model", "mode", "model_id", "model_name", "modells"])
def test_a_misspelt_model_is_not_answered_by_the_only_adapter(alone: Server, wrong: str) -> None:
    for path, text in (("/predict", "inputs"), ("/a/reviews/predict", "inputs"), ("/v1/classify", "input")):
        status, failure, _ = alone.ask("POST", path, {text: "boring", wrong: "topics"})
        assert (status, failure["error"].startswith(f"{wrong}: ")) == (422, True), failure
        assert "Is `model" in failure["error"]
        assert alone.ask("POST", path, {text: "boring", wrong: "topics", "model": "reviews"})[0] == 200
    assert alone.ask("POST", "/predict", {"inputs": [["a"]], "modelss": ["reviews"]})[0] == 422


def test_fields_of_other_servers_are_ignored(alone: Server) -> None:
    tei = ["normalize", "prompt_name", "return_all_scores", "options", "dimensions", "request_id"]
    vllm = ["truncate_prompt_tokens", "add_special_tokens", "activation", "softmax", "user", "priority", "modalities"]
    for path, text in (("/predict", "inputs"), ("/v1/classify", "input")):
        body = {text: "boring"} | dict.fromkeys([*tei, *vllm, "", "mödel", "m" * 10_000], 1)
        assert alone.ask("POST", path, body)[0] == 200


def test_an_address_for_each_adapter(server: Server, made: tuple[Path, dict[str, Any]]) -> None:
    found = server.predict({"inputs": TEXTS[0]}, "/a/topics/predict")
    check(found, expected(made, "topics", TEXTS[:1])[0], LABELS["topics"])
    assert server.ask("POST", "/a/topics/predict", {"inputs": "a", "model": "reviews"})[0] == 422
    assert server.ask("POST", "/a/nobody/predict", {"inputs": "a"})[0] == 404


# -- the others


def test_vllm(server: Server, made: tuple[Path, dict[str, Any]]) -> None:
    for path in ("/v1/classify", "/classify", "/a/topics/v1/classify"):
        found = server.predict({"model": "topics", "input": TEXTS}, path)
        assert (found["object"], found["model"], len(found["data"])) == ("list", "topics", 4)
        for i, (one, row) in enumerate(zip(found["data"], expected(made, "topics", TEXTS), strict=True)):
            assert (one["index"], one["num_classes"]) == (i, 3)
            assert one["probs"] == pytest.approx(row.tolist(), abs=1e-4)
            assert one["label"] == LABELS["topics"][int(row.argmax())]
        assert found["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(("shape", "data"), [([4], TEXTS), ([4, 1], TEXTS), ([4, 1], [[text] for text in TEXTS])])
def test_kserve(server: Server, made: tuple[Path, dict[str, Any]], shape: list[int], data: list[Any]) -> None:
    body = {"id": "7", "inputs": [{"name": "x", "shape": shape, "datatype": "BYTES", "data": data}]}
    found = server.predict(body, "/v2/models/topics/infer")
    rows = expected(made, "topics", TEXTS)
    outputs = {one["name"]: one for one in found["outputs"]}
    assert (found["model_name"], found["id"], found["model_version"][:2]) == ("topics", "7", "1-")
    assert outputs["label"]["data"] == [LABELS["topics"][i] for i in rows.argmax(1)]
    assert outputs["probs"]["data"] == pytest.approx(rows.ravel().tolist(), abs=1e-4)
    assert outputs["probs"]["parameters"] == {"labels": list(LABELS["topics"])}
    assert server.predict(body | {"outputs": [{"name": "score"}]}, "/v2/models/topics/infer")["outputs"] == [
        outputs["score"]
    ]
    assert server.ask("GET", "/v2/models/topics")[1]["outputs"][2]["shape"] == [-1, 3]
    assert server.ask("GET", "/v2/models/topics/ready")[1] == {"name": "topics", "ready": True}
    assert server.ask("GET", "/v2/models/nobody/ready")[0] == 404


def test_hugging_faces_client_unchanged(server: Server, made: tuple[Path, dict[str, Any]]) -> None:
    program = (
        "import json, sys, huggingface_hub; client = huggingface_hub.InferenceClient(sys.argv[1]);"
        "found = client.text_classification(sys.argv[2]); print(json.dumps({one.label: one.score for one in found}))"
    )
    command = [sys.executable, "-c", program, f"{server.url}/a/topics", TEXTS[0]]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True)
    row = expected(made, "topics", TEXTS[:1])[0]
    assert json.loads(done.stdout) == pytest.approx(dict(zip(LABELS["topics"], row, strict=True)), abs=1e-4)


def test_parameters_of_hugging_faces_client(server: Server, made: tuple[Path, dict[str, Any]]) -> None:
    program = (
        "import json, sys, huggingface_hub; client = huggingface_hub.InferenceClient(sys.argv[1]);"
        "ask = lambda **more: [(one.label, one.score) for one in client.text_classification(sys.argv[2], **more)];"
        "print(json.dumps([ask(top_k=1), ask(function_to_apply='none'), ask(top_k=2, function_to_apply='softmax')]))"
    )
    command = [sys.executable, "-c", program, f"{server.url}/a/topics", TEXTS[0]]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True)
    best, raw, two = json.loads(done.stdout)
    scores = dict(zip(LABELS["topics"], expected(made, "topics", TEXTS[:1])[0].tolist(), strict=True))
    logits = answers(made[1]["topics"], TEXTS[:1], made[0] / "base")[0].tolist()
    order = sorted(scores, key=lambda label: -scores[label])
    assert [label for label, _ in best] == order[:1]
    assert [label for label, _ in two] == order[:2]
    assert dict(two) == pytest.approx({label: scores[label] for label in order[:2]}, abs=1e-4)
    assert dict(raw) == pytest.approx(dict(zip(LABELS["topics"], logits, strict=True)), abs=1e-4)


@pytest.mark.parametrize(
    ("parameters", "status", "said"),
    [
        ({"function_to_apply": "sigmoid"}, 422, "parameters.function_to_apply: sigmoid scores each label alone"),
        ({"function_to_apply": "tanh"}, 422, "parameters.function_to_apply: "),
        ({"top_k": 0}, 422, "parameters.top_k: "),
        ({"top_k": None, "function_to_apply": None, "truncation": True}, 200, ""),
        (None, 200, ""),
    ],
)
def test_parameters_that_cannot_be_are_refused(server: Server, parameters: object, status: int, said: str) -> None:
    found, answer, _ = server.ask("POST", "/a/topics", {"inputs": "a", "parameters": parameters})
    assert found == status
    assert status == 200 or answer["error"].startswith(said)


# -- operating


def test_lists_states_and_figures(server: Server) -> None:
    server.predict({"inputs": "boring", "model": "reviews"})
    assert [one["id"] for one in server.ask("GET", "/v1/models")[1]["data"]] == ["reviews", "topics"]
    assert [one["id"] for one in server.ask("GET", "/v1/models?limit=1")[1]["data"]] == ["reviews"]
    assert [one["id"] for one in server.ask("GET", "/v1/models?after=reviews")[1]["data"]] == ["topics"]
    status = server.ask("GET", "/v1/adapters/reviews")[1]
    assert (status["state"], status["labels"], status["generation"]) == ("resident", ["neg", "pos"], 1)
    assert status["bytes"] > 0
    info = server.ask("GET", "/info")[1]
    assert info["adapters"]["registered"] == 2
    for path in ("/livez", "/readyz", "/health", "/ping", "/v2/health/live", "/v2/health/ready", "/v2"):
        assert server.ask("GET", path)[0] == 200
    metrics = server.ask("GET", "/metrics")[1]
    values = dict(re.findall(r"^(\w+) ([\d.e+-]+)$", metrics, re.MULTILINE))
    assert float(values["te_request_success_total"]) > 0
    assert float(values["adapters_registered"]) == 2
    assert "reviews" not in metrics


def test_the_api_is_documented_and_its_page_needs_no_network(server: Server) -> None:
    spec = server.ask("GET", "/openapi.json")[1]
    assert {"/predict", "/v1/classify", "/v2/models/{adapter}/infer", "/a/{adapter}/predict"} <= spec["paths"].keys()
    for path in ("/docs", "/"):
        page = server.ask("GET", path)[1]
        for address in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert address.startswith("/")
            status, _, headers = server.ask("GET", address)
            assert status == 200
            assert headers.get("cache-control") == "no-cache" or not address.startswith("/page/")


def test_admin_routes_are_off_unless_asked_for(server: Server) -> None:
    for method in ("PUT", "PATCH", "DELETE"):
        for name in ("reviews", "nobody"):
            status, failure, _ = server.ask(method, f"/v1/adapters/{name}", {"pin": True})
            assert (status, failure["error_type"], failure["code"]) == (403, "forbidden", "serve.admin")
            assert "--admin" in failure["mend"]
    assert server.ask("GET", "/v1/adapters/reviews")[0] == 200


def test_another_name_for_this_host_is_refused(server: Server) -> None:
    assert server.ask("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 400


# -- adding, replacing, removing


def upload(folder: Path) -> tuple[bytes, dict[str, str]]:
    edge, pieces = "edge-of-the-parts", []
    for file in folder.iterdir():
        head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
        pieces.append(head.encode() + file.read_bytes() + b"\r\n")
    return b"".join(pieces) + f"--{edge}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={edge}"}


def test_an_adapter_is_uploaded_replaced_pinned_and_removed(guarded: Server, made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    admin = bearer(ADMIN)
    raw, headers = upload(folder / "spare")
    status, found, _ = guarded.ask("PUT", "/v1/adapters/new", raw=raw, headers=headers | admin)
    assert (status, found["state"], found["generation"]) == (200, "resident", 1)
    scores = guarded.predict({"inputs": TEXTS[0], "model": "new"}, **admin)
    check(scores, expected(made, "spare", TEXTS[:1], 1.0)[0], ("neg", "pos"))

    raw, headers = upload(folder / "adapters" / "topics")
    status, found, _ = guarded.ask("PUT", "/v1/adapters/new", raw=raw, headers=headers | admin)
    assert (status, found["generation"], found["labels"]) == (200, 2, list(LABELS["topics"]))
    assert guarded.ask("PATCH", "/v1/adapters/new", {"pin": True}, headers=admin)[1]["pinned"]
    assert guarded.ask("DELETE", "/v1/adapters/new?if_generation=1", headers=admin)[0] == 412
    assert guarded.ask("DELETE", "/v1/adapters/new", headers=admin)[0] == 200
    assert guarded.ask("POST", "/predict", {"inputs": "a", "model": "new"}, headers=admin)[0] == 404

    told = lambda: [line.strip() for line in guarded.lines if line.startswith("new: ")]  # noqa: E731
    for _ in range(100):
        if len(told()) >= 4:
            break
        time.sleep(0.05)
    first, second = (f"new: version {number}-[0-9a-f]{{12}} put here by everything" for number in (1, 2))
    lines = "\n".join([first, second, "new: pinned by everything", "new: removed by everything"])
    assert re.fullmatch(lines, "\n".join(told()))


def test_a_bad_upload_is_refused_and_the_old_version_answers(
    guarded: Server, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    admin = bearer(ADMIN)
    before = guarded.predict({"inputs": TEXTS[0], "model": "topics"}, **admin)
    shutil.copytree(made[0] / "spare", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"no tensors")
    raw, headers = upload(tmp_path / "bad")
    status, found, _ = guarded.ask("PUT", "/v1/adapters/topics", raw=raw, headers=headers | admin)
    assert (status, found["code"]) == (422, "adapter.damaged")
    assert guarded.predict({"inputs": TEXTS[0], "model": "topics"}, **admin) == before
    for folder in ("../spare", "/etc", "nowhere", ".new"):
        assert guarded.ask("PUT", "/v1/adapters/x", {"folder": folder}, headers=admin)[0] == 422
    assert guarded.ask("PUT", "/v1/adapters/..%2fx", {"folder": "topics"}, headers=admin)[0] in (404, 422)


def test_a_folder_that_is_renamed_into_the_directory_is_served(
    guarded: Server, made: tuple[Path, dict[str, Any]]
) -> None:
    admin = bearer(ADMIN)
    directory = Path(guarded.process.args[guarded.process.args.index("--adapter-dir") + 1])  # type: ignore[index, arg-type, union-attr]
    shutil.copytree(made[0] / "spare", directory / ".draft")
    (directory / ".draft").rename(directory / "late")
    for _ in range(100):
        status, scores, _ = guarded.ask("POST", "/predict", {"inputs": TEXTS[0], "model": "late"}, headers=admin)
        if status == 200:
            break
        time.sleep(0.1)
    check(scores, expected(made, "spare", TEXTS[:1], 1.0)[0], ("neg", "pos"))
    shutil.rmtree(directory / "late")
    for _ in range(100):
        if guarded.ask("POST", "/predict", {"inputs": "a", "model": "late"}, headers=admin)[0] == 404:
            return
        time.sleep(0.1)
    raise AssertionError("it is still served")


# -- tokens


def test_no_route_but_the_public_ones_answers_without_the_right_token(guarded: Server) -> None:
    spec = guarded.ask("GET", "/openapi.json")[1]
    routes = [(path, method) for path, methods in spec["paths"].items() for method in methods]
    assert len(routes) >= 25
    bypasses = []
    for path, method in routes:
        address = path.replace("{adapter}", "reviews")
        for headers in (
            {},
            bearer("wrong"),
            {"Authorization": f"Basic {ADMIN}"},
            bearer(""),
            {"X-Api-Key": READER[:-1]},
        ):
            status, _, _ = guarded.ask(method.upper(), address, {}, headers=headers)
            if status != 401 and path not in PUBLIC:
                bypasses.append((method, address, headers, status))
    assert bypasses == []
    for variant in (
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/page/../v1/models",
        "/docs/../v1/models",
        "/v1%2fmodels",
    ):
        status, found, _ = guarded.ask("GET", variant)
        assert status != 200 or "reviews" not in str(found)


def test_a_body_that_nobody_may_send_is_not_kept(guarded: Server) -> None:
    assert guarded.ask("PUT", "/health", raw=b"x" * (3 << 20))[0] == 413
    assert guarded.ask("PUT", "/health", raw=b"x")[0] == 413
    assert guarded.ask("PUT", "/v1/adapters/reviews", raw=b"x" * (3 << 20), headers=bearer(READER))[0] == 413


def test_half_a_request_is_none(guarded: Server) -> None:
    head = f"PUT /v1/adapters/half HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\r\n"
    body = '{"folder": "reviews"}'
    with socket.create_connection((urlsplit(guarded.url).hostname, urlsplit(guarded.url).port)) as one:
        # All of the JSON, and an end that never comes.
        one.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 30\r\n\r\n{body}".encode())
    time.sleep(0.5)
    assert guarded.ask("GET", "/v1/adapters/half", headers=bearer(ADMIN))[0] == 404


def test_a_token_asks_its_own_adapters_and_changes_none(guarded: Server) -> None:
    reader = bearer(READER)
    assert guarded.ask("POST", "/predict", {"inputs": "a", "model": "reviews"}, headers=reader)[0] == 200
    assert guarded.ask("POST", "/predict", {"inputs": "a"}, headers=reader)[0] == 200  # the only one that it may ask
    assert guarded.ask("POST", "/predict", {"inputs": "a", "model": "topics"}, headers=reader)[0] == 403
    mixed = {"inputs": [["a"], ["b"]], "models": ["reviews", "topics"]}
    assert guarded.ask("POST", "/predict", mixed, headers=reader)[0] == 403
    for path in ("/a/topics", "/a/topics/predict", "/a/topics/v1/classify", "/v2/models/topics/infer"):
        body = {"inputs": "a", "input": "a"}
        if path.endswith("infer"):
            body = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}  # type: ignore[dict-item]
        assert guarded.ask("POST", path, body, headers=reader)[0] == 403
    for path in ("/v1/models/topics", "/v1/adapters/topics", "/v2/models/topics", "/v2/models/topics/ready"):
        assert guarded.ask("GET", path, headers=reader)[0] == 403
    assert [one["id"] for one in guarded.ask("GET", "/v1/models", headers=reader)[1]["data"]] == ["reviews"]
    assert [one["name"] for one in guarded.ask("GET", "/v1/adapters", headers=reader)[1]["adapters"]] == ["reviews"]
    for method in ("PUT", "PATCH", "DELETE"):
        assert guarded.ask(method, "/v1/adapters/reviews", {"pin": True}, headers=reader)[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "more", "body", "status", "code"),
    [
        ("GET", "/v1/models", {}, None, 401, "serve.token"),
        ("POST", "/predict", bearer(ADMIN), b"x" * (3 << 20), 413, "serve.body"),
        ("GET", "/health", {}, b"x", 413, "serve.body"),
        ("POST", "/predict", bearer(ADMIN) | {"Content-Encoding": "gzip"}, b"x", 415, "serve.encoding"),
        ("POST", "/predict", bearer(ADMIN) | {"Inference-Header-Content-Length": "1"}, b"x", 415, "serve.encoding"),
        ("GET", "/v1/models", bearer(ADMIN) | {"X-1": "a" * 9_000, "X-2": "a" * 9_000}, None, 431, "serve.headers"),
        ("GET", "/v1/models/topics", bearer(READER), None, 403, "serve.forbidden"),
        ("POST", "/a/topics", bearer(READER), b'{"inputs": "a"}', 403, "serve.forbidden"),
        ("PATCH", "/v1/adapters/topics", bearer(READER), b'{"pin": true}', 403, "serve.forbidden"),
        ("PUT", "/v1/adapters/x", bearer(ADMIN) | {"Content-Type": "text/plain"}, b"x", 415, "serve.kind"),
        ("POST", "/predict", bearer(ADMIN), b'{"inputs": "a"}', 400, "serve.request"),
        ("POST", "/predict", bearer(ADMIN), b"{}", 422, "serve.request"),
        ("GET", "/nowhere", bearer(ADMIN), None, 404, "serve.route"),
        ("GET", "/predict", bearer(ADMIN), None, 405, "serve.method"),
    ],
)
def test_a_refusal_has_a_code_and_a_mend(
    guarded: Server, method: str, path: str, more: dict[str, str], body: bytes | None, status: int, code: str
) -> None:
    found, failure, _ = guarded.ask(method, path, raw=body, headers=more)
    assert (found, failure["code"], bool(failure["mend"])) == (status, code, True), failure


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--tokens FILE"),
        (["--tokens", "missing.toml"], "cannot be read"),
        ([], "nothing to serve"),
        (["--memory", "lots", "--base", "BASE"], "no size"),
    ],
)
def test_what_cannot_be_served_ends_with_2(made: tuple[Path, dict[str, Any]], arguments: list[str], said: str) -> None:
    given = [str(made[0] / "base") if one == "BASE" else one for one in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "serve", "--port", "0", *given], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("kind", "raw", "said"),
    [
        ("application/json", b'{"inputs": "a-private-text"', "The body is no JSON, from character 27 on."),
        ("application/json", b'["a-private-text"]', "The body is no JSON object."),
        ("text/plain", b'{"inputs": "a-private-text"}', "Content-Type is text/plain, expected application/json."),
    ],
)
def test_a_body_that_cannot_be_read_says_which_fault_it_has(guarded: Server, kind: str, raw: bytes, said: str) -> None:
    headers = bearer(ADMIN) | {"Content-Type": kind}
    status, found, _ = guarded.ask("POST", "/predict", raw=raw, headers=headers)
    assert (status, found["error"]) == (422, said)
    status, found, _ = guarded.ask("PUT", "/v1/adapters/reviews", raw=raw, headers=headers)
    assert status in (415, 422)
    assert "private" not in "".join(guarded.lines)


def test_an_adapter_whose_fault_is_no_text_spoils_no_list(
    guarded: Server, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    admin = bearer(ADMIN)
    shutil.copytree(made[0] / "spare", tmp_path / "evil")
    (tmp_path / "evil" / "trimtab.json").write_text('{"schema_version": "\\ud800"}', "utf-8")
    raw, kind = upload(tmp_path / "evil")
    status, said, _ = guarded.ask("PUT", "/v1/adapters/evil", raw=raw, headers=kind | admin)
    assert (status, said["code"]) == (422, "adapter.schema")
    assert guarded.ask("GET", "/v1/adapters", headers=admin)[0] == 200


# -- manners


def test_slow_clients_are_let_go_and_others_do_not_notice(made: tuple[Path, dict[str, Any]]) -> None:
    server = start(str(made[0] / "adapters" / "reviews"))
    host, port = urlsplit(server.url).hostname, urlsplit(server.url).port
    slow = [socket.create_connection((host, port)) for _ in range(200)]
    begin = time.monotonic()
    for i, one in enumerate(slow):
        one.sendall((b"", b"POST /predict HTTP/1.1\r\nHo", b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
                     b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nPOST /predict HTTP/1.1\r\n"
                     b"Host: localhost\r\nContent-Length: 1000\r\n\r\n{")[i % 4])  # fmt: skip
    waits = []
    for _ in range(20):
        at = time.monotonic()
        server.predict({"inputs": "boring"})
        waits.append(time.monotonic() - at)
    assert max(waits) < 2
    for one in slow:
        one.settimeout(max(0.1, 15 - (time.monotonic() - begin)))
        while one.recv(1_000):
            pass
        one.close()
    assert time.monotonic() - begin < 12
    assert server.stop() == 0


def test_headers_that_are_too_long_are_refused(server: Server) -> None:
    assert server.ask("GET", "/health", headers={"X-Long": "a" * 10_000})[0] == 200
    for size in (20_000, 100_000):
        try:
            status = server.ask("GET", "/health", headers={"X-Long": "a" * size})[0]
        except OSError:
            status = 0  # it closed the connection while we still sent
        assert status in (0, 400, 431)
    assert server.ask("GET", "/health")[0] == 200


def test_a_deadline_that_cannot_be_met_is_504(server: Server) -> None:
    body = {"inputs": [[TEXTS[2]]] * 200, "model": "reviews"}
    status, found, _ = server.ask("POST", "/predict", body, headers={"X-Request-Timeout-Ms": "1"})
    assert (status, found["error_type"]) == (504, "timeout")
    for wrong in ("0", "-1", "soon", "1e3", "99999999999", "0" * 5_000 + "1", "600001"):
        assert server.ask("POST", "/predict", body, headers={"X-Request-Timeout-Ms": wrong})[0] == 422


def test_who_went_away_is_not_computed(server: Server) -> None:
    def figure(name: str) -> float:
        found = re.search(rf"^{name} (\S+)", server.ask("GET", "/metrics")[1], re.MULTILINE)
        assert found
        return float(found.group(1))

    def until(is_true: Callable[[], bool]) -> bool:
        return any(is_true() or time.sleep(0.05) for _ in range(200))

    before, body = (
        figure("te_rows_dropped_total"),
        json.dumps({"inputs": [[TEXTS[2]]] * 250, "model": "reviews"}).encode(),
    )
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    there = (urlsplit(server.url).hostname, urlsplit(server.url).port)
    callers = [socket.create_connection(there) for _ in range(20)]
    for one in callers:
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert until(lambda: figure("te_queue_size") > 500)  # who goes before is not even put there
    for one in callers:
        one.close()
    assert until(lambda: figure("te_rows_dropped_total") > before)


def stopped_under_load(made: tuple[Path, dict[str, Any]], *options: str) -> tuple[Server, list[tuple[float, int, Any]]]:
    """A server that was asked to stop while callers wait; and when each request began, its status and its body."""
    server = start(str(made[0] / "adapters" / "reviews"), *options)
    found: list[tuple[float, int, Any]] = []

    def call() -> None:
        while True:
            begun = time.monotonic()
            try:
                status, said, headers = server.ask("POST", "/predict", {"inputs": [[TEXTS[2]]] * 200})
            except ConnectionRefusedError:
                return  # nothing listens any more
            except (OSError, http.client.HTTPException) as error:
                found.append((begun, 0, error))
                return
            if status == 503 and "close" not in headers["connection"]:
                said = {"error": "it keeps the connection"}
            found.append((begun, status, said))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    at = time.monotonic()
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    return server, [(begun - at, status, said) for begun, status, said in found]


def test_sigterm_finishes_what_was_accepted_and_ends_with_0(made: tuple[Path, dict[str, Any]]) -> None:
    server, found = stopped_under_load(made)
    assert {status for begun, status, _ in found if begun < -0.1} == {200}
    assert {status for _, status, _ in found} <= {200, 503, 0}
    assert {said["error"] for _, status, said in found if status == 503} <= {
        "The server stops; it takes no new requests."
    }
    assert "stopped; all that was accepted has been answered\n" in server.lines


def test_what_is_not_finished_in_time_is_told_so_and_counted(made: tuple[Path, dict[str, Any]]) -> None:
    server, found = stopped_under_load(made, "--drain", "0")
    told = [said for _, status, said in found if status == 503 and "before this was answered" in said["error"]]
    assert told
    assert {status for begun, status, _ in found if begun < -0.1} <= {200, 503}
    assert f"stopped; {len(told)} accepted requests were told that it stops (503)\n" in server.lines


def test_no_text_and_no_secret_is_in_the_log(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The text is sent by every way in, to routes that answer and to those that refuse, also where libraries warn."""
    shutil.copytree(made[0] / "adapters", tmp_path / "adapters")
    (tmp_path / "tokens.toml").write_text(TOKENS, "utf-8")
    server = start(
        *("--adapter-dir", str(tmp_path / "adapters"), "--watch", "0", "--admin"),
        *("--tokens", str(tmp_path / "tokens.toml")),
    )
    text, wrong, admin = "a-very-private-sentence", "wrong-wrong-wrong-wrong", bearer(ADMIN)
    assert server.ask("POST", "/predict", {"inputs": text, "model": "reviews"}, headers=admin)[0] == 200
    for body in ({"inputs": [text, text]}, {"inputs": text, "model": text}, {text: text}, [text], text):
        for path in ("/predict", "/v1/classify", "/v2/models/reviews/infer", "/a/reviews"):
            assert server.ask("POST", path, body, headers=admin)[0] in (404, 422)
    assert server.ask("GET", f"/v1/models?after={text}", headers=admin | {"X-Text": text})[0] == 200
    assert server.ask("GET", f"/{text}", headers=admin)[0] == 404
    assert server.ask("POST", "/predict", {"inputs": text}, headers=bearer(wrong))[0] == 401
    raw, kind = upload(made[0] / "spare")
    for odd in (
        raw[2:],
        raw.replace(b'filename="trimtab.json"', f'filename="{text}"'.encode()),
        raw.replace(b"Content-Disposition", f"{text} : 1\r\nContent-Disposition".encode(), 1),
        raw.replace(b"form-data", text.encode()),
        raw + text.encode(),
    ):
        assert server.ask("PUT", "/v1/adapters/spare", raw=odd, headers=kind | admin)[0] in (200, 400, 422)
    assert server.stop() == 0
    said = "".join(server.lines)
    assert [secret for secret in (text, wrong, ADMIN) if secret in said] == []
    words = {line.split()[0] for line in server.lines}
    assert words == {"base", "adapters", "ready", "spare:", "stopped;"}, said  # no library says a word
