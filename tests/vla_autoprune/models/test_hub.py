"""`--model` as a hub id, against a server on this machine that speaks what huggingface_hub asks of one."""

from __future__ import annotations

import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")

from vla_autoprune.errors import InputError
from vla_autoprune.models.hub import downloaded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": {}}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "preprocessor_config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode(),
    "model-1.safetensors": b"weights",
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"a pickle",
    "optimizer.pt": b"a pickle",
    "checkpoint-500/model-1.safetensors": b"older weights",
}
MODELS = {
    "org/driver": FILES,
    "org/gated": FILES,
    "org/pickled": {name: FILES[name] for name in ("config.json", "tokenizer.json", "pytorch_model.bin")},
    "org/other": {**FILES, "config.json": json.dumps({"architectures": ["GPT2LMHeadModel"]}).encode()},
}


class Hub(BaseHTTPRequestHandler):
    """Model info, list of files, and files, as huggingface_hub asks for them."""

    def __init__(self, asked: list[str], *connection) -> None:
        self.asked = asked
        super().__init__(*connection)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        model, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        files = MODELS.get(model, {})
        if not files:
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif rest[0] == "revision":
            self._answer(200, json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode())
        elif rest[0] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        elif model == "org/gated":
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            name = "/".join(rest[2:])
            self.asked.append(name)
            self._answer(200, files[name], {"ETag": _oid(files[name]), "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The names of the files that were asked for; huggingface_hub talks to this server only."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, asked)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        _point_to(f"http://127.0.0.1:{running.server_port}", tmp_path, monkeypatch)
        yield asked
        running.shutdown()
        thread.join()


def _point_to(endpoint: str, cache, monkeypatch) -> None:
    constants = hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_what_a_checkpoint_needs_is_downloaded_and_nothing_else(server):
    folder = downloaded("org/driver")
    wanted = {name for name in FILES if name.endswith(".json")} | {"model-1.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted == set(server)
    assert (folder / "model-1.safetensors").read_bytes() == b"weights"
    server.clear()
    assert downloaded("org/driver") == folder and not server, "the cache has it"


def test_what_is_not_supported_is_refused_before_its_weights_come(server):
    with pytest.raises(InputError, match="class GPT2LMHeadModel is not supported"):
        downloaded("org/other")
    assert "config.json" in server and not any(name.endswith(".safetensors") for name in server)
    with pytest.raises(InputError, match=r"--model org/pickled: .* no safetensors files of it; pickled"):
        downloaded("org/pickled")
    assert "pytorch_model.bin" not in server


@pytest.mark.parametrize(
    "model,message",
    [
        ("org/absent", r"--model org/absent: no such folder, .* no model of that name, .* HF_TOKEN"),
        ("org/gated", r"--model org/gated: .* accept them at http://127\S+/org/gated and .* HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_give_is_told_with_the_way_out(server, model, message):
    with pytest.raises(InputError, match=message) as caught:
        downloaded(model)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch):
    _point_to("http://127.0.0.1:1", tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"cannot be reached \(Connect.*hf download org/driver --local-dir"):
        downloaded("org/driver")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"is not asked, as HF_HUB_OFFLINE is set; .* hf download org"):
        downloaded("org/driver")
