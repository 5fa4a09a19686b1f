"""The page and its server, in a real server process and a real browser, with the demo's checkpoint and pedestrians.

Neither the people nor their captions were seen in training.
"""

import http.client
import http.server
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import search
from tests.helpers.demo import Unseen, draw_unseen, identity_of, write_demo_checkpoint
from tests.helpers.runs import ROOT

for module in ("fastapi", "uvicorn"):
    pytest.importorskip(module, reason="needs requirements-search.txt")

pytestmark = pytest.mark.slow

PEOPLE = 60
USERS = 50


class Site(NamedTuple):
    """A running server: its port, the folder that it searches, and the people in it."""

    port: int
    folder: Path
    people: dict[str, Unseen]

    @property
    def captions(self) -> list[tuple[str, str]]:
        """All captions, each with the identity that it describes."""
        return [
            (caption, identity)
            for identity, person in self.people.items()
            for captions in person.captions.values()
            for caption in captions
        ]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def paths(self) -> list[str]:
        assert self.status == 200, self
        return [result["path"] for result in json.loads(self.body)["results"]]

    @property
    def error(self) -> str:
        assert self.headers["content-type"] == "application/json" and self.status >= 400, self
        (error,) = json.loads(self.body).values()
        return error


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    write_demo_checkpoint(root / "demo.pth")
    people = draw_unseen(root / "crops", PEOPLE)
    (root / "secret.jpg").write_bytes(b"not in the index")
    index(root / "crops", "--checkpoint", root / "demo.pth")
    (root / "crops" / "later.jpg").write_bytes(b"not in the index")
    with running(root / "crops") as (port, process):
        yield Site(port, root / "crops", people)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def index(folder: Path, *arguments) -> None:
    """Runs `search.py index` in this process: importing torch again would take most of the time."""
    assert search.main(["index", str(folder), "--workers", "0", *map(str, arguments)]) == 0


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """Runs `search.py serve` on a free port, and provides the port and the process."""
    command = [sys.executable, "search.py", "serve", folder, "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield int(line.split(" (")[0].rpartition(":")[2]), process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def get(site) -> Callable[..., Answer]:
    """A function that sends a request without changing its path."""

    def get(address: str, /, method: str = "GET", headers: dict[str, str] | None = None, **parameters) -> Answer:
        if parameters:
            address += "?" + urllib.parse.urlencode(parameters)
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        try:
            connection.request(method, address, headers=headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    return get


# ---- the server -----------------------------------------------------------------------------------------------------


def test_the_right_people_come_first(site, get):
    """R@1 of the demo is 55 among 250 people, so it must be higher among 60; chance is 1.7."""
    captions = site.captions[::5]
    hits = [identity_of(get("/api/search", text=caption, results=1).paths[0]) == who for caption, who in captions]
    assert len(captions) == 96 and sum(hits) / len(hits) > 0.55


def test_scores_fall_and_the_threshold_cuts(get):
    answer = json.loads(get("/api/search", text="a woman in a red coat", results=30).body)
    scores = [result["score"] for result in answer["results"]]
    assert len(scores) == 30 and scores == sorted(scores, reverse=True) and answer["images"] == 4 * PEOPLE
    cut = json.loads(get("/api/search", text="a woman in a red coat", results=30, threshold=scores[9]).body)
    assert len(cut["results"]) == 10
    assert get("/api/search", text="a woman in a red coat", threshold=1).paths == []


def test_a_picture_is_most_similar_to_itself(site, get):
    path = next(iter(site.people["1601"].captions))
    found = get("/api/similar", path=path, results=4).paths
    assert found[0] == path and len(found) == 4


def test_pictures_of_the_index_are_served(site, get):
    path = next(iter(site.people["1601"].captions))
    answer = get(f"/images/{path}")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    assert answer.body == (site.folder / path).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "..%2fsecret.jpg",
        "%2e%2e/secret.jpg",
        "cam_a/../../secret.jpg",
        "cam_a/..%5c..%5csecret.jpg",
        "//etc/passwd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "....//secret.jpg",
        "cam_a%00.jpg",
        "%ff%fe.jpg",
        "../crops_index/index.json",
        "later.jpg",
        "cam_a",
        "",
        ".",
    ],
)
def test_only_pictures_of_the_index_are_served(site, get, path):
    assert get(f"/images/{path}").status == 404
    assert get("/api/similar", path=urllib.parse.unquote(path, errors="replace")).status == 404


@pytest.mark.parametrize("path", ["../server.py", "%2e%2e/server.py", "..%2fserver.py", "//etc/passwd", "none.js", ""])
def test_only_files_of_the_page_are_static(get, path):
    assert get(f"/static/{path}").status == 404


def test_a_removed_picture_is_reported(site, get, tmp_path):
    path = next(iter(site.people["1602"].captions))
    shutil.move(site.folder / path, tmp_path / "away.jpg")
    try:
        assert get(f"/images/{path}").error == f"{path} does not exist any more: index the folder again"
    finally:
        shutil.move(tmp_path / "away.jpg", site.folder / path)


def test_a_link_that_has_replaced_a_picture_is_not_followed(site, get, tmp_path):
    path = next(iter(site.people["1602"].captions))
    shutil.move(site.folder / path, tmp_path / "away.jpg")
    (site.folder / path).symlink_to(tmp_path / "away.jpg")
    try:
        assert get(f"/images/{path}").status == 200  # the very file that was indexed
        (site.folder / path).unlink()
        (site.folder / path).symlink_to("/etc/passwd")
        assert get(f"/images/{path}").error == f"{path} has been replaced: index the folder again"
    finally:
        (site.folder / path).unlink()
        shutil.move(tmp_path / "away.jpg", site.folder / path)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"text": "x" * 10_000}, "the description has 10,000 characters: shorten it to at most 500"),
        ({"text": "😀" * 10_000}, "the description has 10,000 characters: shorten it to at most 500"),
        ({"text": "a\x00b"}, "U+0000"),
        ({"text": "\x1b[31mred"}, "U+001B"),
        ({"text": "red\x7f"}, "U+007F"),
        ({"text": ""}, "empty"),
        ({"text": " \n "}, "empty"),
        ({}, "text: field required"),
        ({"text": "red", "results": 0}, "results: input should be greater than or equal to 1, not 0"),
        ({"text": "red", "results": 201}, "results: "),
        ({"text": "red", "results": "many"}, "results: "),
        ({"text": "red", "threshold": "nan"}, "threshold: "),
        ({"text": "red", "threshold": 2}, "threshold: "),
    ],
)
def test_bad_requests_get_a_clear_error(get, parameters, message):
    answer = get("/api/search", **parameters)
    assert answer.status == 400 and message in answer.error and "\n" not in answer.error


def test_other_addresses_and_methods_get_a_clear_error(get):
    assert (get("/nothing").status, get("/nothing").error) == (404, "/nothing: Not Found")
    assert get("/docs").status == 404
    assert get("/api/search", method="POST", text="red").status == 405
    assert get("/api/similar").error == "path: field required"


def test_requests_with_another_host_name_are_refused(site, get):
    answer = get("/api/about", headers={"Host": f"evil.example:{site.port}"})
    assert answer.status == 400 and "evil.example" in answer.error
    assert get("/api/about", headers={"Host": f"localhost:{site.port}"}).status == 200
    with running(site.folder, "--allow-host", "evil.example") as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/api/about", headers={"Host": "evil.example"})
        assert connection.getresponse().status == 200


def test_it_listens_on_this_machine_only(site):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        assert other.connect_ex(("127.0.0.2", site.port)) != 0


def test_a_port_in_use_is_reported_in_one_line(site):
    command = [sys.executable, "search.py", "serve", site.folder, "--port", str(site.port)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "Address already in use" in ended.stderr and "--port" in ended.stderr


def test_fifty_users_at_once_get_the_same_results_as_one(site, get):
    captions = [caption for caption, _ in site.captions[: USERS * 8 : 8]]
    alone = [get("/api/search", text=caption, results=5).paths for caption in captions]
    with ThreadPoolExecutor(USERS) as users:
        together = list(users.map(lambda caption: get("/api/search", text=caption, results=5).paths, captions))
    assert len(captions) == USERS
    # Rounding differs between one query and several, so results with equal scores may swap places.
    assert [set(paths) for paths in together] == [set(paths) for paths in alone]


def test_a_new_index_is_found_without_a_restart(site, get, tmp_path):
    folder = tmp_path / "crops"
    shutil.copytree(site.folder / "cam_a", folder / "cam_a")
    index(folder, "--checkpoint", site.folder.parent / "demo.pth")
    with running(folder) as (port, _):

        def images() -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/api/search?text=red")
            return json.loads(connection.getresponse().read())["images"]

        before = images()
        shutil.copytree(site.folder / "cam_b", folder / "cam_b")
        index(folder)
        assert before < images() == len(list(folder.rglob("*.jpg")))


# ---- the browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """Debian's Chromium, headless."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium has no sandbox as root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield browser
    browser.quit()


class Page:
    """The page in the browser: what a user does and sees."""

    def __init__(self, browser, site: Site):
        from selenium.webdriver.common.keys import Keys

        self.browser, self.site, self.keys = browser, site, Keys

    def open(self, query: str = "") -> None:
        self.browser.get(f"http://127.0.0.1:{self.site.port}/{query}")
        self.settle()

    def one(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def type(self, text: str, column: int = 1) -> None:
        field = self.one(f"#text-{column}")
        field.clear()
        field.send_keys(text, self.keys.ENTER)
        self.settle()

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)
        self.settle()

    def settle(self) -> None:
        """Waits until no search is running; changed settings start one only after a short pause."""
        time.sleep(0.1)
        self.until(lambda: not self.browser.find_elements("css selector", "[aria-busy=true]"))

    def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.browser.find_element("css selector", "body").text
            time.sleep(0.05)

    def paths(self, column: int = 1) -> list[str]:
        cards = f"document.querySelectorAll('#results-{column} > .card')"
        return self.browser.execute_script(f"return [...{cards}].map((card) => card.dataset.path)")

    def focused(self, attribute: str) -> str | None:
        return self.browser.switch_to.active_element.get_attribute(attribute)


@pytest.fixture
def page(chromium, site) -> Iterator[Page]:
    page = Page(chromium, site)
    chromium.set_window_size(1280, 900)
    chromium.get_log("browser")
    page.open()
    yield page
    complaints = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [entry for entry in complaints if "status of 4" not in entry["message"]], complaints


def test_typing_a_description_shows_the_right_people_first(page, site, get):
    """Captions of unseen people; and a description for which at most one of the first four results is wrong."""
    for caption, who in site.captions[:4]:
        expected = get("/api/search", text=caption, results=20).paths
        page.type(caption)
        assert page.paths() == expected
        assert who in [identity_of(path) for path in page.paths()[:10]]
    page.type("a woman in a red coat")
    wears_red = [
        person.upper.colour == "red" for person in (site.people[identity_of(path)].person for path in page.paths()[:4])
    ]
    assert sum(wears_red) >= 3
    assert page.one("#status-1").text.startswith(f"20 of {4 * PEOPLE} pictures in ")
    pictures = page.browser.find_elements("css selector", "#results-1 img")
    page.until(lambda: pictures[0].get_property("naturalWidth") == 64)


def test_more_like_a_card_and_back(page, get):
    page.type("a man with a blue jacket")
    before = page.paths()
    page.browser.find_elements("css selector", "#results-1 .more")[2].click()
    page.settle()
    assert page.paths() == get("/api/similar", path=before[2], results=20).paths
    assert before[2] in page.one("#like-1").text
    similar = page.paths()
    page.browser.back()
    page.until(lambda: page.paths() == before)
    page.browser.forward()
    page.until(lambda: page.paths() == similar)
    page.one("#back-1").click()
    page.until(lambda: page.paths() == before)


def test_two_descriptions_side_by_side(page):
    page.type("a woman in a red coat")
    page.one("#compare").click()
    page.type("a woman in a red dress", column=2)
    first, second = page.paths(1), page.paths(2)
    assert len(first) == len(second) == 20 and first != second
    marked = [
        card.get_attribute("data-path")
        for card in page.browser.find_elements("css selector", "#results-1 > .card")
        if card.find_element("css selector", ".both").is_displayed()
    ]
    assert marked == [path for path in first if path in second]
    left, right = (page.one(f"#column-{column}").rect for column in (1, 2))
    assert left["x"] + left["width"] <= right["x"] + 1 and left["y"] == right["y"]
    page.browser.refresh()  # the address contains both searches
    page.settle()
    assert (page.paths(1), page.paths(2)) == (first, second)
    page.one("#compare").click()
    assert not page.one("#column-2").is_displayed()


def test_number_of_results_and_threshold(page):
    page.type("a man in black")
    for field, value, expected in (("#count", "5", 5), ("#threshold", "1", 0), ("#threshold", "", 5)):
        page.one(field).send_keys(page.keys.CONTROL, "a")
        page.one(field).send_keys(value or page.keys.DELETE)
        page.until(lambda expected=expected: len(page.paths()) == expected)
        if value == "1":
            page.until(lambda: page.one("#status-1").text.startswith("nothing above 1.00; the best score is 0."))
    page.settle()
    assert page.one("#status-1").text.startswith("5 of ")


class SubPath(http.server.BaseHTTPRequestHandler):
    """Passes requests below a path on to the site, as the proxies of notebook servers do."""

    site: Site
    path_of_page = "/user/me/proxy/8123/"

    def do_GET(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.site.port)
        below = self.path.startswith(self.path_of_page)
        connection.request("GET", self.path.removeprefix(self.path_of_page[:-1]) if below else "/nothing")
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())

    def log_message(self, *arguments):
        pass


def test_the_page_behind_a_path_of_another_server(page, site):
    SubPath.site = site
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SubPath) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        try:
            page.browser.get(f"http://127.0.0.1:{proxy.server_port}{SubPath.path_of_page}")
            page.type("a woman in a red coat")
            assert len(page.paths()) == 20 and SubPath.path_of_page in page.browser.current_url
            picture = page.one("#results-1 img")
            page.until(lambda: picture.get_property("naturalWidth") == 64)
            assert page.one(".picture").value_of_css_property("position") == "relative"  # the style is there
        finally:
            proxy.shutdown()
            page.open()


def test_the_end_of_a_long_name_is_visible(page):
    page.type("a man in black")
    left, right, box = page.browser.execute_script("""
        const name = document.querySelector(".file bdi");
        name.textContent = "x".repeat(60) + "_0001.jpg";
        const end = document.createRange();
        end.setStart(name.firstChild, 60);
        end.setEnd(name.firstChild, 69);
        const [text, box] = [end, name.parentElement].map((one) => one.getBoundingClientRect());
        return [text.left, text.right, [box.left, box.right]];
    """)
    assert box[0] <= left < right <= box[1] + 1


def test_a_description_that_is_cut_is_noticed(page):
    page.type("a woman with red hair and " * 19)
    assert "Note: the model reads 77 tokens" in page.one("#status-1").text
    page.type("a woman with red hair")
    assert "Note" not in page.one("#status-1").text


def test_the_page_with_only_the_keyboard(page):
    page.type("a man in black")
    page.press(page.keys.TAB)  # the button
    page.press(page.keys.TAB)
    assert page.focused("class") == "more"
    paths = page.paths()

    def card() -> str:
        return page.browser.execute_script("return document.activeElement.closest('.card').dataset.path")

    page.press(page.keys.ARROW_RIGHT)
    assert card() == paths[1]
    page.press(page.keys.ARROW_DOWN)
    assert card() not in paths[:3]
    page.press(page.keys.ARROW_UP)
    assert card() == paths[1]
    page.press(page.keys.END)
    assert card() == paths[-1]
    page.press(page.keys.HOME, page.keys.ARROW_RIGHT, page.keys.ENTER)
    assert page.paths()[0] == paths[1]  # a picture is most similar to itself
    page.press(page.keys.ESCAPE)
    assert page.focused("id") == "text-1"


def test_errors_are_shown_and_then_disappear(page, site):
    page.open("?" + urllib.parse.urlencode({"q": "x" * 10_000}))
    assert "at most 500" in page.one("#error-1").text and page.paths() == []
    page.open("?" + urllib.parse.urlencode({"q": "a\x01b"}))
    assert "U+0001" in page.one("#error-1").text
    page.open("?" + urllib.parse.urlencode({"q": "", "like": "../secret.jpg"}))
    assert "is not in the index" in page.one("#error-1").text
    page.type("<img src=x onerror=alert(1)>")
    assert not page.one("#error-1").is_displayed() and len(page.paths()) == 20
    assert len(page.one("#text-1").get_attribute("maxlength")) == 3


@pytest.mark.parametrize("width", [360, 320])
def test_the_page_on_a_phone(page, width):
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open("?" + urllib.parse.urlencode({"q": "a woman in a red coat"}))
        tops = [card.rect["y"] for card in page.browser.find_elements("css selector", "#results-1 > .card")]
        assert tops.count(tops[0]) >= 2
        page.one("#compare").click()
        page.type("a man in black", column=2)
        wide = page.browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        for selector in ("#search-1 button", "#text-1", "#compare", "#results-1 .more"):
            assert page.one(selector).rect["height"] >= 43.5
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
