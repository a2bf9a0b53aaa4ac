"""Finding pretrained models: folders, a hub (played by a server on this machine), and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from nascompile import models
from nascompile.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a random BERT of two layers and three labels."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
        id2label={0: "bad", 1: "so-so", 2: "good"}, label2id={"bad": 0, "so-so": 1, "good": 2},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def folder_with(tmp_path, config, weights="model.safetensors"):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights:
        (tmp_path / weights).write_bytes(b"")
    return tmp_path


def test_a_local_folder_is_taken_as_it_is(tiny_bert):
    assert models.locate(str(tiny_bert)) == tiny_bert
    config = models.read_config(tiny_bert)
    assert config.hidden_size == 16
    assert models.family_of(config.model_type).name == "bert"
    assert models.has_head(tiny_bert)
    assert models.head_labels(config) == ("bad", "so-so", "good")


def test_the_digest_of_weights_sees_one_byte(tiny_bert, tmp_path):
    copy = tmp_path / "model.safetensors"
    content = bytearray((tiny_bert / "model.safetensors").read_bytes())
    copy.write_bytes(content)
    assert models.weights_digest(tmp_path) == models.weights_digest(tiny_bert)
    content[-1] ^= 1
    copy.write_bytes(content)
    assert models.weights_digest(tmp_path) != models.weights_digest(tiny_bert)


def test_a_model_without_head_is_seen(tmp_path, tiny_bert):
    from transformers import BertModel

    BertModel.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    assert not models.has_head(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        models.locate(str(folder_with(tmp_path, None)))
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(("weights", "says"), [("pytorch_model.bin", "found: pytorch_model.bin"), ("", "no weights at all")])
def test_a_folder_without_safetensors_is_refused_and_nothing_is_unpickled(weights, says, tmp_path):
    folder = folder_with(tmp_path, {"model_type": "bert"}, weights)
    if weights:  # running this pickle would leave a file behind
        trap = tmp_path / "unpickled"
        (folder / weights).write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        models.locate(str(folder))
    assert says in caught.value.detail
    assert "save_pretrained" in caught.value.hint
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "rwkv9"}, "unknown architecture: rwkv9"),
        ({}, "no model_type"),
        ('{"model_type": ', "damaged config.json"),
    ],
)
def test_an_architecture_no_family_handles_is_refused(config, says, tmp_path):
    with pytest.raises(ModelError, match=says) as caught:
        models.read_config(folder_with(tmp_path, config))
    if "architecture" in says:
        assert "bert (" in caught.value.hint
        assert "vit (" in caught.value.hint


MCU = {"model_type": "mcu_vit", "image_size": 32, "hidden_size": 64, "num_hidden_layers": 3, "depths": [2, 3]}


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"patchsizes": [8]}, "unknown entry patchsizes: did you mean patch_sizes?"),
        ({"layer_norm_epsilon": 1e-6}, "unknown entry layer_norm_epsilon: did you mean layer_norm_eps?"),
        ({"depths": "three"}, 'depths = "three": a list of whole numbers is needed'),
        ({"depths": 3}, "depths = 3: a list of whole numbers is needed"),
        ({"depths": [2.5, 3]}, "depths = [2.5, 3]: a list of whole numbers is needed"),
        ({"hidden_size": [64]}, "hidden_size = [64]: a whole number is needed"),
        ({"hidden_size": "64"}, 'hidden_size = "64": a whole number is needed'),
        ({"layer_norm_eps": "small"}, 'layer_norm_eps = "small": a number is needed'),
    ],
)
def test_a_description_that_would_be_misread_is_refused(tmp_path, entries, fault):
    with pytest.raises(ModelError, match="cannot be meant so") as caught:
        models.read_config(folder_with(tmp_path, MCU | entries))
    assert caught.value.detail == fault
    assert caught.value.hint


def test_entries_that_hugging_face_adds_are_none_of_ours(tmp_path):
    added = {"num_labels": 3, "architectures": ["X"], "transformers_version": "6", "dtype": "float32", "layer_norm_eps": 1, "problem": None}
    assert models.read_config(folder_with(tmp_path, MCU | added)).depths == [2, 3]
    saved = tmp_path / "saved"
    models.read_config(folder_with(tmp_path, MCU)).save_pretrained(saved)
    assert models.read_config(saved).hidden_size == 64


# ---------------------------------------------------------------------------------------------- a hub on this machine


def etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The routes of a model hub that a download needs: a revision, its list of files, and a file."""

    protocol_version = "HTTP/1.1"
    folders: dict[str, Path]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path).strip("/")
        for name, folder in self.folders.items():
            if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                files = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                return self.send({}, json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": files}).encode(), body)
            if path == f"api/models/{name}/tree/{COMMIT}":
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)} for p in sorted(folder.iterdir())]
                return self.send({}, json.dumps(tree).encode(), body)
            for revision in ("main", COMMIT):
                file = folder / path.removeprefix(f"{name}/resolve/{revision}/")
                if path.startswith(f"{name}/resolve/{revision}/") and file.is_file():
                    return self.send({"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes(), body)
        return self.send({"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}", body, 404)

    def send(self, headers, content, body, status=200):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        self.server.asked.append(f"{self.command} {self.path}")


@pytest.fixture
def hub(tiny_bert, tmp_path):
    """(address, requests it got) of a hub with `team/tiny`, and `team/pickled` that has no safetensors."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    folder_with(pickled, {"model_type": "bert"}, "pytorch_model.bin")
    handler = type("OneHub", (Hub,), {"folders": {"team/tiny": tiny_bert, "team/pickled": pickled}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server.asked
    server.shutdown()
    thread.join()
    server.server_close()


LOCATE = """
import json, sys
from nascompile import models
from nascompile.errors import NascompileError
try:
    print(json.dumps({"folder": str(models.locate(sys.argv[1]))}))
except NascompileError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def locate(name, address, home):
    """What `locate` does in a process of its own: the hub's address is read once, on import."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment.update(HF_ENDPOINT=address, HF_HOME=str(home), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_ETAG_TIMEOUT="3")
    done = subprocess.run([sys.executable, "-c", LOCATE, name], env=environment, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_a_hub_id_is_downloaded_once_and_only_what_is_safe(hub, tiny_bert, tmp_path):
    address, asked = hub
    found = locate("team/tiny", address, tmp_path / "home")
    assert models.head_labels(models.read_config(Path(found["folder"]))) == ("bad", "so-so", "good")
    assert Path(found["folder"]).is_relative_to(tmp_path / "home")
    assert models.weights_digest(Path(found["folder"])) == models.weights_digest(tiny_bert)
    first = len([line for line in asked if line.startswith("GET") and "safetensors" in line])
    assert locate("team/tiny", address, tmp_path / "home")["folder"] == found["folder"]
    assert len([line for line in asked if line.startswith("GET") and "safetensors" in line]) == first == 1


def test_a_pickled_model_of_the_hub_is_not_even_downloaded(hub, tmp_path):
    address, asked = hub
    found = locate("team/pickled", address, tmp_path / "home")
    assert found["error"] == "ModelError"
    assert "no safetensors weights" in found["text"]
    assert not [line for line in asked if line.endswith(".bin")]


def test_an_id_the_hub_does_not_know_is_an_error(hub, tmp_path):
    found = locate("team/absent", hub[0], tmp_path / "home")
    assert found["error"] == "ModelError"
    assert "cannot find the model: team/absent" in found["text"]
    assert "hint: " in found["text"]


def test_a_hub_that_cannot_be_reached_is_an_error(tmp_path):
    found = locate("team/tiny", "http://127.0.0.1:9", tmp_path / "home")
    assert found["error"] == "ModelError"
    assert "cannot find the model: team/tiny" in found["text"]
