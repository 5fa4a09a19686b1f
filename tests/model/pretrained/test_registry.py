"""Tags of open_clip: their weights, the search for the file, and the behaviour without a network."""

import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import save_file

from misc.errors import UserError
from model.pretrained import registry
from model.pretrained.registry import Entry, fetch, find_entry
from model.pretrained.settings import Settings
from model.pretrained.weights import read_weights
from tests.helpers.fork_server import ROOT, Call, ForkServer
from tests.helpers.runs import Outcome, only_error
from tests.helpers.seeded import clip_weights

SIZES = {"embed": 32, "resolution": (224, 224), "patch": 16, "vision_width": 96, "vision_layers": 1}
SIZES |= {"text_width": 64, "text_layers": 1}


NARROW = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 96, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 8, "layers": 1},
}
"""A small replacement for open_clip's configuration of ViT-B-16, so that no test needs 600 MB of weights."""


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in clip_weights(**SIZES).items()}


# ---- the weights of a tag -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "activation"),
    [
        ("openai", "ViT-B-16/openai", "quick_gelu"),
        ("laion2b_s34b_b88k", "ViT-B-16/laion2b_s34b_b88k", "gelu"),  # ViT-g-14 has this tag too
        ("laion2b-s34b-b88k", "ViT-B-16/laion2b_s34b_b88k", "gelu"),
        ("datacomp_xl_s13b_b90k", "ViT-B-16/datacomp_xl_s13b_b90k", "gelu"),
        ("dfn2b", "ViT-B-16/dfn2b", "quick_gelu"),
        ("metaclip_400m", "ViT-B-16/metaclip_400m", "quick_gelu"),
        ("laion400m_e32", "ViT-B-16/laion400m_e32", "gelu"),
        ("ViT-B-32/laion400m_e32", "ViT-B-32/laion400m_e32", "quick_gelu"),
        ("laion2b_e16", "ViT-B-32/laion2b_e16", "gelu"),  # ViT-B-16 does not have it
        ("ViT-L-14/openai", "ViT-L-14/openai", "quick_gelu"),
        ("ViT-L-14-quickgelu/openai", "ViT-L-14/openai", "quick_gelu"),
        ("ViT-H-14/laion2b_s32b_b79k", "ViT-H-14/laion2b_s32b_b79k", "gelu"),
    ],
)
def test_a_tag_comes_with_its_model_and_activation(source, name, activation):
    entry = find_entry(source)
    assert (entry.name, entry.settings.activation) == (name, activation)


def test_a_tag_comes_with_heads_resolution_and_preprocessing():
    settings = find_entry("ViT-L-14/laion2b_s32b_b82k").settings
    assert (settings.vision_heads, settings.text_heads, settings.resolution) == (16, 12, (224, 224))
    assert settings.preprocessing.mean == (0.5, 0.5, 0.5)  # unlike all others
    assert find_entry("ViT-H-14/laion2b_s32b_b79k").settings.vision_heads == 16


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("laion2b_s34b_b88", ["no such file or folder", "laion2b_s34b_b88k"]),
        ("ViT-B-61/openai", ["no such file or folder", "ViT-B-16/openai"]),
        ("runs/full", ["no such file or folder", "such as openai"]),
        ("laion2b_s13b_b90k", ["several models", "coca_ViT-B-32/", "coca_ViT-L-14/"]),
        ("coca_ViT-B-32/laion2b_s13b_b90k", ["another kind of model"]),
        ("RN50/openai", ["another kind of model", "layers: [3, 4, 6, 3]"]),
        ("ViT-B-16-SigLIP/webli", ["another kind of model", "timm_model_name"]),
        ("ViT-H-14-CLIPA/datacomp1b", ["another kind of model", "no_ln_pre"]),
        ("ViT-g-14/laion2b_s34b_b88k", ["another kind of model", "mlp_ratio"]),
    ],
)
def test_a_tag_that_means_no_clip_is_refused(source, words):
    with pytest.raises(UserError) as caught:
        read_weights(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: ") and all(word in message for word in words) and "\n" not in message


# ---- the search for the file ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home of a user who has downloaded nothing, on a machine without a network."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nothing listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def test_without_a_network_the_path_of_the_file_is_reported(home, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: NARROW)
    place = home / ".cache/clip/ViT-B-16-laion2b_s34b_b88k"
    with pytest.raises(UserError) as caught:
        read_weights("laion2b_s34b_b88k")
    assert "\n" not in str(caught.value) and str(place) in str(caught.value)
    assert "https://huggingface.co/laion/CLIP-ViT-B-16-laion2B-s34B-b88K" in str(caught.value)

    place.parent.mkdir(parents=True)
    save_file(weights(), place)
    found = read_weights("laion2b_s34b_b88k")
    assert (found.name, found.settings.activation) == (f"ViT-B-16/laion2b_s34b_b88k ({place})", "gelu")
    assert all(torch.equal(found.state[name], value) for name, value in weights().items())


def test_a_server_that_never_answers_is_not_waited_for(home, monkeypatch):
    """Name resolution, and connections through some firewalls, can hang for minutes."""
    ended = threading.Event()

    def hang(*_, **__):
        ended.wait()
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.perf_counter()
    with pytest.raises(UserError, match="cannot be reached"):
        fetch(find_entry("openai"))  # has two addresses
    assert time.perf_counter() - started < 3 * registry.CONNECT_TIMEOUT
    ended.set()


def test_a_hub_that_the_user_has_turned_off_is_not_asked(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fetch(find_entry("laion2b_s34b_b88k"))


def test_a_proxy_with_an_invalid_address_counts_as_no_network(home, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:abc")
    with pytest.raises(UserError, match="huggingface.co cannot be reached"):
        fetch(find_entry("laion2b_s34b_b88k"))


def test_our_addresses_of_openai_are_those_of_open_clip():
    """Version 3 of open_clip has them."""
    theirs = {model: get_pretrained_cfg(model, "openai").get("url") for model in registry.OPENAI_URLS}
    assert all(url in (None, "", registry.OPENAI_URLS[model]) for model, url in theirs.items())


@pytest.mark.parametrize("only_hub", [False, True])
def test_a_file_that_is_not_the_one_of_its_tag_is_refused_and_kept(home, monkeypatch, only_hub):
    """Also if open_clip names only the hub for OpenAI's weights, as its main branch does."""
    if only_hub:
        download = get_pretrained_cfg("ViT-B-16", "openai")
        bare = {key: value for key, value in download.items() if key != "url"}
        monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda *_: bare)
    place = home / ".cache/clip/ViT-B-16.pt"
    place.parent.mkdir(parents=True)
    torch.save(weights(), place)
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    with pytest.raises(UserError) as caught:
        fetch(find_entry("openai"))
    message = str(caught.value)
    assert all(word in message for word in (str(place), digest[:8], "5806e77c", "remove it")) and "\n" not in message
    assert hashlib.sha256(place.read_bytes()).hexdigest() == digest


def test_a_tag_whose_file_contains_another_model_is_refused(home):
    place = home / ".cache/clip/ViT-B-16-laion2b_s34b_b88k"
    place.parent.mkdir(parents=True)
    narrow = clip_weights(**SIZES | {"vision_width": 64})
    save_file({name: torch.as_tensor(value) for name, value in narrow.items()}, place)
    with pytest.raises(UserError, match="vision_width 768.*vision_width 64.*two models") as caught:
        read_weights("laion2b_s34b_b88k")
    assert str(place) in str(caught.value)


# ---- downloads, by open_clip itself, from a server on this machine --------------------------------------------------


@contextmanager
def server(files: dict[str, bytes], sent: int | None = None, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serves files like a plain web server and the Hugging Face hub; with `sent`, only this many bytes of each.

    Yields its address, and the list of requests.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, with_body: bool) -> None:
            asked.append(f"{self.command} {self.path}")
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            content = b"" if content is None else content
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content[:sent])

        def do_GET(self):
            self.answer(with_body=True)

        def do_HEAD(self):
            self.answer(with_body=False)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        running.server_close()


def test_a_file_at_a_plain_address_is_downloaded_checked_and_kept(home, tmp_path):
    torch.save(weights(), tmp_path / "weights.pt")
    content = (tmp_path / "weights.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    path = f"/mlfoundations/small-{digest}.pt"  # open_clip looks for the checksum in names of its own releases
    with server({path: content}) as (address, asked):
        entry = Entry("small/test", Settings("gelu"), {"url": address + path, "hf_hub": ""})
        first = fetch(entry)
        assert first == home / ".cache/clip" / Path(path).name and first.read_bytes() == content
        asked.clear()
        assert fetch(entry) == first and not asked
        assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize("cut", [True, False])
def test_nothing_is_kept_of_an_interrupted_download(home, tmp_path, cut):
    """open_clip itself keeps it, and would use it as the weights from then on."""
    torch.save(weights(), tmp_path / "weights.pt")
    content = (tmp_path / "weights.pt").read_bytes()
    with server({"/b16.pt": content}, sent=len(content) // 2 if cut else None) as (address, _):
        entry = Entry("small/test", Settings("gelu"), {"url": address + "/b16.pt", "hf_hub": ""})
        if not cut:
            assert fetch(entry).read_bytes() == content
            return
        with pytest.raises(UserError, match="small/test cannot be downloaded .*damaged"):
            fetch(entry)
    assert not list((home / ".cache/clip").iterdir())


def test_the_plain_address_is_asked_if_the_hub_does_not_have_the_file(home, tmp_path, monkeypatch):
    torch.save(weights(), tmp_path / "weights.pt")
    content = (tmp_path / "weights.pt").read_bytes()
    with server({"/b16.pt": content}) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        download = {"url": address + "/b16.pt", "hf_hub": "nobody/nothing/"}
        monkeypatch.setattr(registry, "_download_from_hub", lambda entry: (_ for _ in ()).throw(OSError("404")))
        assert fetch(Entry("small/test", Settings("gelu"), download)).read_bytes() == content


def test_a_file_with_another_checksum_is_refused(home):
    path = "/mlfoundations/small-00000000.pt"
    refused = pytest.raises(UserError, match=r"small/test cannot be downloaded .*SHA256.*put it at")
    with server({path: b"something else"}) as (address, _), refused:
        fetch(Entry("small/test", Settings("gelu"), {"url": address + path, "hf_hub": ""}))


def test_a_file_that_the_server_does_not_have_is_refused(home):
    refused = pytest.raises(UserError, match=r"small/test cannot be downloaded \(HTTP Error 404.*put it at")
    with server({}) as (address, _), refused:
        fetch(Entry("small/test", Settings("gelu"), {"url": address + "/none.pt", "hf_hub": ""}))


class User:
    """A user with an empty home, who runs `main.py` in new processes. Both imports, of it and open_clip, are made once.

    Attributes:
        port: the port of this machine at which they expect the Hugging Face hub.
        imported: those of open_clip and transformers that `import main` has imported.
    """

    def __init__(self, home: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        hub = f"http://127.0.0.1:{self.port}"
        own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub, "no_proxy": "127.0.0.1"}
        self.environment = os.environ | own
        with patch.dict(os.environ, own):  # before the imports, which read them
            self.server = ForkServer(ROOT)
        code = "import sys; print(*{'open_clip', 'transformers'} & sys.modules.keys(), 'main' in sys.modules)"
        ended = self.server([Call(exec, (code,), self.environment, ROOT)])  # first: the next calls import open_clip
        *self.imported, main = ended.out.split()
        assert main == "True", ended

    def main(self, *arguments: str) -> Outcome:
        ended = self.server([Call(main_with_narrow_model, (arguments,), self.environment, ROOT)])
        return Outcome(ended.statuses[0], ended.out, ended.err)


def main_with_narrow_model(arguments: tuple[str, ...]) -> int:
    import main  # only in a user's process

    open_clip.get_model_config = lambda name: NARROW
    sys.argv = ["main.py", *arguments]
    return main.main()


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Iterator[User]:
    user = User(tmp_path_factory.mktemp("home"))
    yield user
    user.server.close()


@pytest.mark.slow
def test_a_tag_is_downloaded_from_the_hub_once(tmp_path, user):
    save_file(weights(), tmp_path / "weights.safetensors")
    path = "/laion/CLIP-ViT-B-16-laion2B-s34B-b88K/resolve/main/open_clip_model.safetensors"
    out = tmp_path / "out"
    with server({path: (tmp_path / "weights.safetensors").read_bytes()}, port=user.port) as (_, asked):
        outcome = user.main("--export", "openclip", str(out), "model.checkpoint=laion2b_s34b_b88k")
        assert outcome.status == 0, outcome
        assert (
            "weights of ViT-B-16/laion2b_s34b_b88k" in outcome.out
            and "activation: gelu (known from the weights)" in outcome.out
        )
        assert f"GET {path}" in asked
    found = read_weights(out)
    assert all(torch.equal(found.state[name], value) for name, value in weights().items())
    assert found.settings.activation == "gelu"

    # The server has stopped, but the file is on this machine.
    again = user.main("--export", "openclip", str(tmp_path / "again"), "model.checkpoint=laion2b_s34b_b88k")
    assert again.status == 0, again
    missing = user.main("--export", "openclip", str(tmp_path / "other"), "model.checkpoint=dfn2b")
    assert "127.0.0.1 cannot be reached" in only_error(missing) and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_open_clip_is_imported_only_for_tags(user):
    """Its import takes seconds."""
    assert user.imported == []
    assert not registry.may_be_tag("data/ViT-B-16.pt") and registry.may_be_tag("ViT-B-16/openai")
