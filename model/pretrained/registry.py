"""Finds the file of a tag in open_clip's registry, such as `openai`, `laion2b_s34b_b88k` or `ViT-L-14/openai`.

open_clip downloads, checks and stores the file. It is imported only if a tag is used, because that takes seconds.
"""

import difflib
import hashlib
import re
import socket
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from misc.errors import UserError
from misc.files import expanded, is_file
from model.pretrained.archives import open_archive
from model.pretrained.settings import Settings, settings_from_open_clip

DEFAULT_MODEL = "ViT-B-16"
"""The model of a tag without a model, if it has this tag: the paper's backbone."""
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
OPENAI_URLS = {
    "ViT-B-32": f"{_OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B-16": f"{_OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L-14": f"{_OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L-14-336": f"{_OPENAI}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
"""OpenAI's own files, as in open_clip 3. Its main branch names only the hub, but users have downloaded these files."""
CACHE_FOLDER = "~/.cache/clip"
"""The folder for downloads from a plain URL, as in open_clip and OpenAI's code."""
CONNECT_TIMEOUT = 1.0
"""Seconds within which a server must answer. The client of the Hugging Face hub would retry for most of a minute."""


@dataclass(frozen=True)
class Entry:
    """An entry of the registry.

    Attributes:
        name: MODEL/TAG.
        settings: the settings that the tensors do not show.
        download: open_clip's own entry, with `url` and `hf_hub`.
    """

    name: str
    settings: Settings
    download: dict[str, Any]


def may_be_tag(source: str) -> bool:
    """Whether `source` looks like TAG or MODEL/TAG, which contain no dots."""
    return re.fullmatch(r"(?:[\w-]+/)?[\w-]+", source) is not None


def find_entry(source: str) -> Entry:
    """Finds the entry of a tag.

    Args:
        source: TAG or MODEL/TAG; `-` and `_` mean the same in a tag.

    Raises UserError if the tag does not exist, its model is not a CLIP, or several models have the tag and ViT-B-16 is
    not one of them.
    """
    from open_clip import get_model_config, list_pretrained
    from open_clip.pretrained import get_pretrained_cfg

    model, _, tag = source.rpartition("/")
    tag = tag.lower().replace("-", "_")
    # Each model with QuickGELU appears in the registry twice, once with a suffix.
    pairs = [(m, t) for m, t in list_pretrained() if not m.endswith("-quickgelu")]
    models = [m for m, t in pairs if t == tag and model.removesuffix("-quickgelu") in ("", m)]
    if not model and DEFAULT_MODEL in models:
        models = [DEFAULT_MODEL]
    if not models:
        known = [f"{m}/{t}" for m, t in pairs] if model else [t for _, t in pairs]
        nearest = difflib.get_close_matches(f"{model}/{tag}" if model else tag, dict.fromkeys(known))
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "give an existing path, or a tag such as openai"
        raise UserError(f"no such file or folder, and no tag of open_clip: {hint}")
    if len(models) > 1:
        raise UserError(f"several models have this tag: give one of {', '.join(f'{m}/{tag}' for m in models)}")
    download = get_pretrained_cfg(models[0], tag)
    if tag == "openai" and not download.get("url"):
        download = {**download, "url": OPENAI_URLS.get(models[0], "")}
    settings = settings_from_open_clip(
        get_model_config(models[0]) or {}, download, quick_gelu=download.get("quick_gelu", False)
    )
    return Entry(f"{models[0]}/{tag}", settings, download)


def fetch(entry: Entry) -> Path:
    """Returns the path of an entry's file, and downloads the file if it is not on this machine.

    Raises UserError if no server answers within `CONNECT_TIMEOUT`, the download fails or is damaged, or the file at the
    path is another one.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    url, (repository, names) = entry.download.get("url", ""), _hub_files(entry)
    local_file = Path(expanded(CACHE_FOLDER)) / (Path(urlsplit(url).path).name if url else entry.name.replace("/", "-"))
    if is_file(local_file):
        _check_digest(local_file, url)
        return local_file
    for name in names if repository else []:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    servers = [constants.ENDPOINT] if repository and not constants.HF_HUB_OFFLINE else []
    servers += [url] if url else []
    reached = _reachable(servers)
    if not reached:
        hosts = " and ".join(filter(None, (urlsplit(server).hostname for server in servers)))
        hosts = hosts or "the Hugging Face hub (HF_HUB_OFFLINE is set)"
        raise UserError(
            f"{entry.name} is not on this machine, and {hosts} cannot be reached: {_manual_download(entry, local_file)}"
        )
    reasons = []
    for server in reached:
        try:
            return _download_from_url(entry, local_file) if server == url else _download_from_hub(entry)
        except (
            OSError,
            HTTPException,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # all that open_clip raises
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
    raise UserError(f"{entry.name} cannot be downloaded ({'; '.join(reasons)}): {_manual_download(entry, local_file)}")


def _hub_files(entry: Entry) -> tuple[str, list[str]]:
    """Returns the repository on the Hugging Face hub, and the file names in it that open_clip searches for."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, name = entry.download.get("hf_hub", "").rpartition("/")
    return repository, [name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]


def _check_digest(path: Path, url: str) -> None:
    """Checks the SHA-256 of a file if its URL contains it.

    The URLs of OpenAI's files contain all of it, those of open_clip's releases its first 8 digits.

    Raises UserError if the SHA-256 differs.
    """
    digest = {"openaipublic": r"/([0-9a-f]{64})/[^/]+$", "mlfoundations": r"-([0-9a-f]{8})\.\w+$"}
    expected = next((re.search(pattern, url) for host, pattern in digest.items() if host in url), None)
    if expected is None:
        return
    found = _sha256(path)
    if not found.startswith(expected[1]):
        raise UserError(
            f"{path} is not the file of {url}: its SHA-256 begins with {found[:8]}, not with {expected[1][:8]}: "
            "remove it, or replace it by the right one"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download_from_hub(entry: Entry) -> Path:
    from open_clip.pretrained import download_pretrained

    return Path(download_pretrained(entry.download, prefer_hf_hub=True))  # the hub's client checks and stores it


def _download_from_url(entry: Entry, local_file: Path) -> Path:
    """Downloads to a temporary folder first, because open_clip leaves a partial file if a download fails."""
    from open_clip.pretrained import download_pretrained_from_url

    local_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local_file.parent, prefix=f"{local_file.name}.") as folder:
        downloaded = Path(download_pretrained_from_url(entry.download["url"], cache_dir=folder))
        open_archive(downloaded)  # not every URL has a checksum
        downloaded.replace(local_file)
    return local_file


def _manual_download(entry: Entry, local_file: Path) -> str:
    repository, names = _hub_files(entry)
    file = entry.download.get("url") or f"{' or '.join(names)} of https://huggingface.co/{repository}"
    return f"download {file} on another machine, and put it at {local_file}"


def _reachable(servers: list[str]) -> list[str]:
    """Returns the servers that answer within `CONNECT_TIMEOUT`, in their order."""
    reached: dict[str, bool] = {}

    def connect(server: str) -> None:
        try:
            socket.create_connection(_host(server), timeout=CONNECT_TIMEOUT).close()
            reached[server] = True
        except (OSError, ValueError):  # ValueError: invalid address of a proxy
            reached[server] = False

    # Name resolution has no time limit, so these threads are not waited for.
    threads = [threading.Thread(target=connect, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + CONNECT_TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [server for server in servers if reached.get(server)]


def _host(server: str) -> tuple[str, int]:
    """Returns the host and port to connect to for a URL: those of the proxy, if one is set."""
    parts = urlsplit(server)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
