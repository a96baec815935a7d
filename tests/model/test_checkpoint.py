"""A name or a path -> a directory with safetensors weights. The hub client is the real one, the hub is made here."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from checkpoints import checkpoint
from leanserve.contracts.errors import CheckpointError
from leanserve.model.checkpoint import find_shards, resolve_model

ROOT = Path(__file__).parents[2]


def directory(tmp_path: Path, *names: str, weight_map: object = ...) -> Path:
    for name in ("config.json", *names):
        (tmp_path / name).touch()
    if weight_map is not ...:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_a_local_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama")
    assert resolve_model(model_dir) == model_dir.resolve()
    monkeypatch.chdir(model_dir.parent)
    assert resolve_model(model_dir.name) == model_dir.resolve(), "a directory wins over a hub id"
    assert resolve_model(f"./{model_dir.name}/") == model_dir.resolve()
    monkeypatch.setenv("HOME", str(model_dir.parent))
    assert resolve_model(f"~/{model_dir.name}") == model_dir.resolve()


def test_shards_come_from_the_index_and_one_file_wins(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    model_dir = directory(tmp_path, *names, weight_map={"b": names[1], "a": names[0], "c": names[1]})
    assert find_shards(model_dir) == [model_dir / name for name in names]
    (model_dir / "model.safetensors").touch()
    assert find_shards(model_dir) == [model_dir / "model.safetensors"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "..", "~nobody-here/x", "-rf", "x.gguf"])
def test_neither_a_directory_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such directory|no config\.json"):
        resolve_model(name)


def test_a_file_instead_of_its_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the checkpoint's directory"):
        resolve_model(directory(tmp_path) / "config.json")


def test_a_directory_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        ([], "it has no weights"),
        (["pytorch_model.bin"], r"it has pytorch_model\.bin.*pickled weights can run code"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "00001-of-00002.bin, pytorch"),
        (["consolidated.00.pth"], r"consolidated\.00\.pth"),
        (["consolidated.safetensors"], r"it has consolidated\.safetensors"),
        (["model.q4.gguf"], r"model\.q4\.gguf"),
    ],
)
def test_a_directory_without_safetensors(tmp_path: Path, names: list[str], seen: str) -> None:
    with pytest.raises(CheckpointError, match=f"no model.safetensors.*{seen}"):
        resolve_model(directory(tmp_path, *names))


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "model.bin",
        "..",
        "",
        None,
        7,
        ["model.safetensors"],
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path: Path, file: object) -> None:
    with pytest.raises(CheckpointError, match=r'weight_map puts "w" into .*same directory'):
        find_shards(directory(tmp_path, weight_map={"w": file}))


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(CheckpointError, match="weight_map"):
        find_shards(directory(tmp_path, weight_map=weight_map))


def test_a_missing_shard(tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    model_dir = directory(tmp_path, names[0], weight_map={name: name for name in names})
    with pytest.raises(CheckpointError, match=f"2 of 3 weight files are missing, the first is {names[1]}"):
        find_shards(model_dir)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """The few routes of the Hugging Face hub that a download needs, over repositories held in memory."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(send_body=False)

            def do_GET(self) -> None:
                self.answer(send_body=True)

            def answer(self, *, send_body: bool) -> None:
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[0] == "api":
                    repo = "/".join(parts[2:4])
                    if files := hub.repositories.get(repo):
                        info: object = {"id": repo, "sha": "0" * 40, "siblings": [{"rfilename": n} for n in files]}
                        if parts[4] == "tree":
                            info = [
                                {"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()
                            ]
                        return self.reply(200, json.dumps(info).encode(), send_body)
                else:
                    repo, name = "/".join(parts[:2]), "/".join(parts[4:])
                    body = hub.repositories.get(repo, {}).get(name)
                    if body is not None:
                        if send_body:
                            hub.fetched.append(name)
                        return self.reply(200, body, send_body)
                code = "GatedRepo" if repo == "some/gated" else "RepoNotFound"
                return self.reply(403 if code == "GatedRepo" else 404, b"", send_body, {"X-Error-Code": code})

            def reply(self, status: int, body: bytes, send_body: bool, extra: dict[str, str] | None = None) -> None:
                self.send_response(status)
                headers = {"Content-Length": str(len(body)), "ETag": f'"{etag(body)}"', "X-Repo-Commit": "0" * 40} | (
                    extra or {}
                )
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if send_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def resolve_elsewhere(name: str, home: Path, **environment: str) -> str:
    """What resolve_model says in a process of its own: the hub client reads its environment when it is imported."""
    script = (
        "import sys\n"
        "from leanserve.contracts.errors import ModelError\n"
        "from leanserve.model.checkpoint import resolve_model\n"
        "try:\n"
        "    print(resolve_model(sys.argv[1]))\n"
        "except ModelError as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", script, name],
        env=clean | {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "NO_PROXY": "*"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_hub_id_fetches_only_what_is_read(hub: Hub, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama", max_shard_size="30KB")
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    unread = ["pytorch_model.bin", "consolidated.safetensors", "modeling_evil.py", "original/params.json", "README.md"]
    hub.repositories["some/model"] = files | {"tokenizer.json": b"{}"} | dict.fromkeys(unread, b"x")

    resolved = Path(resolve_elsewhere("some/model", tmp_path, HF_ENDPOINT=hub.url))
    assert {path.name for path in resolved.iterdir()} == set(files) | {"tokenizer.json"}
    assert not set(hub.fetched) & set(unread)
    hub.fetched.clear()
    assert Path(resolve_elsewhere("some/model", tmp_path, HF_HUB_OFFLINE="1")) == resolved, "from the cache"
    assert not hub.fetched


def test_an_unsupported_model_is_refused_before_its_weights_arrive(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["some/other"] = {"config.json": b'{"model_type": "rwkv"}', "model.safetensors": b"gigabytes"}
    assert resolve_elsewhere("some/other", tmp_path, HF_ENDPOINT=hub.url).startswith("UnsupportedModelError")
    assert hub.fetched == ["config.json"]


def test_the_hub_says_no(hub: Hub, tmp_path: Path) -> None:
    unknown = resolve_elsewhere("some/typo", tmp_path, HF_ENDPOINT=hub.url)
    assert unknown.startswith("ModelError some/typo: neither a local directory nor a public model")
    gated = resolve_elsewhere("some/gated", tmp_path, HF_ENDPOINT=hub.url)
    assert gated.startswith("ModelError some/gated is gated: accept its licence")


def test_no_hub_and_no_copy(tmp_path: Path) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        message = resolve_elsewhere("some/model", tmp_path, **environment)
        assert message.startswith("ModelError some/model: no such local directory, and the Hugging Face hub cannot be")
