"""The server in a thread, with a searcher that knows two pictures: its limits, the names it answers to, its errors."""

import contextlib
import http.client
import importlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from misc.search.pictures import Picture
from misc.search.searcher import Result

for module in ("fastapi", "uvicorn"):
    pytest.importorskip(module, reason="needs requirements-search.txt")
connections, server = (importlib.import_module(f"misc.search.{name}") for name in ("connections", "server"))

HALF_OPEN = b"GET /api/about HTTP/1.1\r\nHost: localhost\r\n"
MOST = 3


class TwoPictures:
    """Replaces the searcher: every query finds both pictures."""

    engine_name = "exact"

    def __init__(self, folder: Path):
        self.folder = folder
        info = SimpleNamespace(pictures=2, checkpoint="clip.pt")
        names = ["a.jpg", "b.jpg"]
        pictures = [Picture(name, 0, 0) for name in names]
        rows = {name: row for row, name in enumerate(names)}
        self.gallery = SimpleNamespace(info=info, row_of=rows.get, picture=pictures.__getitem__)

    def search(self, queries: list) -> list[list[Result]]:
        return [[Result("a.jpg", 0.75), Result("b.jpg", 0.5)] for _ in queries]

    def notice(self, query) -> str | None:
        return "it is cut" if query.description == "long" else None


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., int]]:
    """A function that starts the server and returns its port."""
    monkeypatch.setattr(connections, "connection_limits", lambda: (MOST, 16))
    monkeypatch.setattr(server, "connection_limits", lambda: (MOST, 16))
    for name in ("a.jpg", "b.jpg"):
        Image.effect_noise((1500, 1500), 100).save(tmp_path / name, quality=95)
    servers, threads = [], []
    create = server.uvicorn.Server
    monkeypatch.setattr(server.uvicorn, "Server", lambda settings: servers.append(create(settings)) or servers[-1])

    def start(host: str = "127.0.0.1", allowed: tuple[str, ...] = ()) -> int:
        ports = []
        arguments = (TwoPictures(tmp_path), host, 0, allowed, ports.append)
        threads.append(threading.Thread(target=server.serve, args=arguments))
        threads[-1].start()
        while not (servers and servers[-1].started):
            time.sleep(0.01)
        return int(ports[0].rpartition(":")[2])

    yield start
    for each in servers:
        each.should_exit = True
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def get(port: int, path: str = "/api/about", host: str = "localhost", method: str = "GET", address: str = "127.0.0.1"):
    with contextlib.closing(http.client.HTTPConnection(address, port, timeout=20)) as connection:
        connection.request(method, path, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def error(answer) -> str:
    assert answer[1]["content-type"] == "application/json" and answer[0] >= 400, answer
    (message,) = json.loads(answer[2]).values()
    assert len(message) <= server.LONGEST_ERROR and "\n" not in message
    return message


def test_a_request_that_stays_half_open_is_ended(start, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    port = start()
    for content in (HALF_OPEN, b"", b"GET"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as half:
            half.sendall(content)
            head, _, body = half.makefile("rb").read().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ") and "not complete" in json.loads(body)["error"]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:  # a body that never ends, after its answer
        slow.sendall(b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(1000):
                with contextlib.suppress(OSError):
                    slow.sendall(b"x")
                time.sleep(0.05)


def test_an_answer_that_nobody_reads_is_ended(start, monkeypatch):
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.3)
    port = start()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", port))
        lazy.settimeout(20)
        lazy.sendall(b"GET /images/a.jpg HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8)
        time.sleep(1)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := lazy.recv(1 << 20):
                received += len(part)
    assert received < 8 * 1_500_000  # of eight pictures


def test_many_half_open_requests_do_not_keep_others_out(start, capfd):
    port = start()
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            half.sendall(HALF_OPEN)
        assert get(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_the_limits_fit_the_files_that_a_process_may_open(monkeypatch):
    for allowed in (64, 256, 1024, connections.resource.RLIM_INFINITY):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        most, queue = connections.connection_limits()
        assert 1 <= most <= 256 and 1 <= queue <= 128
        open_now = len([*Path("/dev/fd").iterdir()])
        if allowed - open_now > 30 or allowed < 0:
            assert allowed < 0 or 2 * most + queue <= allowed - open_now


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_it_answers_to_known_names_only(start, host):
    port = start(host, ("Hub.example",))
    address = "127.0.0.2" if host == "127.0.0.2" else "127.0.0.1"
    for known in ("localhost", "127.0.0.1", address, "hub.example", f"localhost:{port}", socket.gethostname()):
        assert get(port, host=known, address=address)[0] == 200, known
    for unknown in ("evil.example", "10.0.0.1", "", "localhost.evil.example", "[", "x" * 5000):
        assert error(get(port, host=unknown, address=address))


def test_every_error_is_one_short_line_of_json(start):
    port = start()
    assert error(get(port, "/images/" + "x" * 50_000)).endswith("is not in the index")
    assert error(get(port, "/" + "x" * 50_000)).endswith("Not Found")
    assert error(get(port, "/api/similar?path=" + "x" * 50_000))
    assert error(get(port, "/api/search?text=red&results=" + "9" * 50_000))
    assert error(get(port, "/static/none.js")) and error(get(port, "/api/about", method="DELETE"))
    for content in (b"no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"x" * 200_000, b"\x16\x03\x01\x00\xff\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(content)
            with contextlib.suppress(ConnectionResetError):  # it does not read the rest
                head, _, body = raw.recv(10_000).partition(b"\r\n\r\n")
                assert b"application/json" in head and list(json.loads(body)) == ["error"]


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/images/a.jpg", "/api/about", "/api/search?text=red"])
def test_head_has_the_headers_of_get_and_no_body(start, path):
    port = start()
    (status, headers, body), (of_get, expected, content) = get(port, path, method="HEAD"), get(port, path)
    assert (status, body) == (of_get, b"") == (200, b"") and content
    assert headers["content-type"] == expected["content-type"]
    assert "search" in path or headers["content-length"] == expected["content-length"]  # it contains the milliseconds


def test_an_empty_answer_has_the_best_score_and_a_cut_description_a_notice(start):
    port = start()
    answer = json.loads(get(port, "/api/search?text=red&threshold=0.8")[2])
    assert (answer["results"], answer["best"], answer["notice"]) == ([], 0.75, None)
    answer = json.loads(get(port, "/api/search?text=long&threshold=0.6")[2])
    assert [result["path"] for result in answer["results"]] == ["a.jpg"] and answer["notice"] == "it is cut"
