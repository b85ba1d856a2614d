"""``push``, to a server of this machine that answers as the hub does: real HTTP, real uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load
from tests.runs.commands import TINY, read, tree, weightlora

from weightlora.tasks import load_model

NAMES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "export.json",
    "record.json",
    "selection.json",
}
TOKEN = "hf_of_a_test"
# The hub's client sends a file by an argument that its HTTP library is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """What the hub keeps, and the requests by which it came there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    """The parts of the hub's API that making a repository and committing to it take."""

    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, data: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        self.server.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/large/"):
            return True
        self.body()
        self.answer({"error": "Invalid username or password."}, 401)
        return False

    def do_GET(self) -> None:
        if not self.allowed():
            return
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name not in self.server.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        self.answer({"id": name, "private": self.server.repos[name], "siblings": []})

    def do_POST(self) -> None:
        if not self.allowed():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(self.body())
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            there = name in self.server.repos
            private = bool(asked.get("private", asked.get("visibility") == "private"))
            self.server.repos.setdefault(name, private)
            self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if there else 200)
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(self.body())["files"]]
            modes = {True: "lfs", False: "regular"}
            self.answer({"files": [{"path": path, "uploadMode": modes[path.endswith(".safetensors")],
                                    "shouldIgnore": False} for path in paths]})  # fmt: skip
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(self.body())["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(self.body())["content"])
            self.answer({"errors": [], "warnings": []})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            kept = self.server.files.setdefault(name, {})
            for line in self.body().splitlines():
                one = json.loads(line)
                value = one["value"]
                if one["key"] == "file":
                    kept[value["path"]] = base64.b64decode(value["content"])
                elif one["key"] == "lfsFile":
                    kept[value["path"]] = self.server.large[value["oid"]]
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1", "success": True})

    def do_PUT(self) -> None:
        if self.allowed():
            data = self.body()
            self.server.large[hashlib.sha256(data).hexdigest()] = data
            self.answer({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a store of its own behind the hub: not in HTTP alone
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def finished(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "run"
    words = ("--task", "sst2", "--data-dir", small_data, *TINY, "--max-steps", "4", "--select-after", "2", "--k", "4")
    assert weightlora("train", *words, "--out", out) == 0
    return out


def test_everything_goes_up_and_loads_from_there(
    finished: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(finished)
    assert weightlora("push", finished, "me/sst2", "--dry-run", "--json", tmp_path / "dry.json") == 0
    assert hub.asked == []
    said = capsys.readouterr().out
    assert said.startswith("would push to me/sst2 (private):")
    assert all(name in said for name in NAMES)
    dry = read(tmp_path / "dry.json")

    assert weightlora("push", finished, "me/sst2", "--json", tmp_path / "push.json") == 0
    assert capsys.readouterr().out.startswith(f"pushed to {hub.url}/me/sst2 (private):")
    assert hub.repos == {"me/sst2": True}
    assert read(tmp_path / "push.json") == {**dry, "url": f"{hub.url}/me/sst2"}
    files = hub.files["me/sst2"]
    assert {name for name in files if not name.startswith(".")} == NAMES
    assert {name: len(data) for name, data in files.items() if name in NAMES} == dict(dry["files"])
    assert files["record.json"] == (finished / "record.json").read_bytes()
    assert "What the run measured" in files["README.md"].decode()
    assert set(hub.cards) == {files["README.md"].decode()}, "the hub looks at a card before it takes it"
    assert len(load(files["adapter_model.safetensors"])) > 0
    assert tree(finished) == before

    for name in NAMES:
        (tmp_path / name).write_bytes(files[name])
    model = PeftModel.from_pretrained(load_model("bert-tiny-shape", num_labels=2).model, tmp_path)
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 4

    assert weightlora("push", finished, "me/sst2", "--profile", "portable") == 0, "an earlier push is replaced"
    assert "head.safetensors" in hub.files["me/sst2"]


def test_what_is_public_is_asked_for(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora("push", finished, "me/open", "--public") == 0
    assert hub.repos == {"me/open": False}
    capsys.readouterr()
    assert weightlora("push", finished, "me/open") == 2
    assert "me/open is there and public; give another name, or --public" in capsys.readouterr().err


def test_one_line_for_what_goes_wrong(
    finished: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*words: object) -> str:
        assert weightlora("push", *words) == 2
        said = capsys.readouterr().err.strip().splitlines()
        return said[-1]

    assert "'no name' is no name of a repository" in fails(finished, "no name")
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "the hub did not take me/x: " in fails(finished, "me/x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub did not take me/x: " in fails(finished, "me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fails(finished, "me/x")
    assert "is not a run directory" in fails(finished.parent, "me/x")
    assert hub.repos == {}
