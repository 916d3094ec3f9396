"""The Hub without a network: an endpoint that answers in memory."""

import base64
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from sqa import InputError, ModelConfig
from sqa.interop import export, load_model, push_to_hub
from sqa.interop.hub import model_card

Make = Callable[..., ModelConfig]


class Endpoint(BaseHTTPRequestHandler):
    """Answers as the Hub does to an upload, and keeps what is committed."""

    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[dict] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            self.answer({"url": "https://huggingface.co/me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitOid": "c0ffee", "commitUrl": "https://huggingface.co/me/model/commit/c0ffee"})
        else:
            self.answer({"error": f"not served: {self.path}"}, status=404)

    def do_GET(self) -> None:
        self.answer({"error": f"not served: {self.path}"}, status=404)

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Endpoint]]:
    Endpoint.files.clear()
    Endpoint.created.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_for_the_test")
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Endpoint
        server.shutdown()
        thread.join()


RESULT = {
    "variant": "sqa",
    "seed": 3,
    "steps": 100,
    "tokens": 204_800,
    "data_fingerprint": "abc123",
    "val": {"loss": 2.5, "accuracy": 0.41, "tokens": 51_200, "loss_all_positions": None},
}


def test_push_uploads_the_export_and_a_card(
    endpoint: type[Endpoint], config_of: Make, model_of, saved, tmp_path: Path
) -> None:
    model = model_of(config_of())
    address = push_to_hub(
        saved(model), "me/model", licence="apache-2.0", private=True, result=RESULT, plan={"lr": 5e-4}
    )
    assert address.endswith("/commit/c0ffee")
    assert endpoint.created["visibility"] == "private"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= endpoint.files.keys()
    weights = load_safetensors(endpoint.files["model.safetensors"])
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    card = endpoint.files["README.md"].decode()
    for part in (
        "license: apache-2.0",
        "| query / KV heads | 4 / 2 |",
        "| validation loss | 2.5 |",
        "| data fingerprint | abc123 |",
        "| seed | 3 |",
        "# SQA, 4 / 2",
        "| validation tokens | 51,200 |",
        '"lr": 0.0005',
        "from_pretrained('me/model')",
    ):
        assert part in card
    assert "None" not in card
    assert str(tmp_path) not in card


def test_push_refuses_before_it_calls(endpoint: type[Endpoint], config_of: Make, model_of, saved) -> None:
    run = saved(model_of(config_of(bias=True)))
    for options, message in (
        ({"repo_id": "me/model"}, "bias=False"),
        ({"repo_id": "model"}, "owner/name"),
        ({"repo_id": "me/model", "format": "gguf"}, "hf, hf-remote"),
    ):
        with pytest.raises(ValueError, match=message):
            push_to_hub(run, licence="mit", **options)
    assert not endpoint.created
    push_to_hub(run, "me/model", licence="mit", format="hf-remote")
    assert "trust_remote_code=True" in endpoint.files["README.md"].decode()
    assert "modeling_sqa.py" in endpoint.files


def test_card_without_a_result(config_of: Make) -> None:
    config = config_of()
    layer = config.layers[0]
    varied = config.replace(attention=(layer, layer.replace(num_query_heads=2)))
    assert "differ by layer" in model_card(varied, licence="mit")
    # keys and values of two layers with two heads of 6, two bytes each
    assert "| KV cache a token (16 bit), bytes | 96 |" in model_card(config, licence="mit")


def test_card_of_a_shape_of_the_plans_own(config_of: Make) -> None:
    card = model_card(config_of(), licence="mit", result={**RESULT, "variant": "sqa-deeper"})
    assert "# sqa-deeper, 4 / 2 query / KV heads" in card


def test_hub_names_are_downloaded(
    config_of: Make, model_of, saved, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(config_of())
    run = saved(model)
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(run)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(load_model("ReactiveAI/SQAT-m").lm_head.weight, model.lm_head.weight)
    ((name, patterns),) = asked
    assert name == "ReactiveAI/SQAT-m"
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)


@pytest.mark.parametrize("source", [None, 5, ["a"], nn.Linear(2, 2)])
def test_what_names_no_model_is_refused(tmp_path: Path, source: Any) -> None:
    for call in (load_model, lambda given: export(given, tmp_path / "out", format="hf")):
        with pytest.raises(InputError, match=r"a name on the Hub, got .*; a model in memory is saved first, with its"):
            call(source)
    with pytest.raises(InputError, match="format must be one of hf, hf-remote, gguf, got None"):
        export(tmp_path, tmp_path / "out", format=None)  # type: ignore[arg-type]


def test_no_network_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, not listening: nobody answers there
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(ValueError, match="no local directory and could not be had from the Hub"):
            load_model("ReactiveAI/SQAT-m")
    with pytest.raises(ValueError, match=r"is no directory, no \.gguf file, nor a name on the Hub"):
        load_model("no such folder/at all/here")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install -c constraints\.txt -e '\.\[hub\]'"):
        load_model("ReactiveAI/SQAT-m")
