"""Search past one machine: the features in a Qdrant server, by its own client.

The index stays what is true, and its features on the disk; a collection of the server follows it. A point is a picture:
its id comes from the path, its payload has `path` and `version`, which tells whether the point is up to date.

Q queries, D width of the shared space.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException
from torch import Tensor

from misc.errors import UserError
from misc.files import atomic_file
from misc.search.engine import EngineChoice
from misc.search.gallery import Gallery
from misc.search.pictures import Picture

POINTS_AT_ONCE = 256
IDS_AT_ONCE = 10_000
SECONDS = 60
"""That the server may take to answer."""
NAMESPACE = uuid.UUID("c6f9b6b1-4a55-5d0c-9b86-0f2f6b1f6d4e")
CLAIM = "qdrant.json"
"""In the index: the collection that it has made, and so may change."""


def check(choice: EngineChoice) -> None:
    """Raises UserError for an address that is none, or where nobody answers."""
    address = choice.address
    if address is None or ("://" not in address and ":" in Path(address).name):
        given = "give the address of the server" if address is None else f"{address} is no address"
        raise UserError(f"--engine qdrant: {given}, as in --qdrant http://HOST:6333")
    with _connected(address) as client:
        client.get_collections()


def build(gallery: Gallery, choice: EngineChoice) -> tuple[dict[str, Any], list[str]]:
    """Makes the collection hold what the gallery holds: what is missing or changed is sent, what is gone deleted.

    Raises UserError where the server cannot be reached or says no, and for a collection that this index has not made.
    """
    collection = choice.collection or gallery.index.name
    settings = {"name": "qdrant", "address": choice.address, "collection": collection}
    with _connected(choice.address) as client:
        _claim(client, gallery, settings)
        versions = _versions(client, collection)
        sent = 0
        points: list[models.PointStruct] = []
        for row, picture in enumerate(gallery.pictures()):
            point = _point_id(picture)
            version = _version(gallery, picture)
            if versions.pop(point, None) != version:
                payload = {"path": picture.path, "version": version}
                points.append(models.PointStruct(id=point, vector=gallery.features[row].tolist(), payload=payload))
            if len(points) == POINTS_AT_ONCE or (points and row + 1 == len(gallery)):
                client.upsert(collection, points)
                sent += len(points)
                points = []
        gone = list(versions)
        for start in range(0, len(gone), IDS_AT_ONCE):
            client.delete(collection, models.PointIdsList(points=gone[start : start + IDS_AT_ONCE]))
    return settings, [f"{choice.address}, collection {collection}: {sent:,} pictures sent, {len(gone):,} deleted"]


class Qdrant:
    """`Engine` of a gallery that `build` was called for."""

    def __init__(self, gallery: Gallery, choice: EngineChoice):
        self.gallery, self.choice = gallery, choice
        self.client = _connect(choice.address)
        with _explained(choice.address):
            if not self.client.collection_exists(choice.collection):
                raise UserError(f"{choice.address} has no collection {choice.collection}: index the folder again")

    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """As `Engine.search`. Pictures that a newer index has put there are left out."""
        requests = [models.QueryRequest(query=query.tolist(), limit=count, with_payload=["path"]) for query in queries]
        with _explained(self.choice.address):
            answers = self.client.query_batch_points(self.choice.collection, requests)
        return [self._found(answer.points) for answer in answers]

    def _found(self, points: list[models.ScoredPoint]) -> tuple[Tensor, Tensor]:
        pairs = [(point.score, self.gallery.row_of(point.payload["path"])) for point in points]
        known = [(score, row) for score, row in pairs if row is not None]
        scores = torch.tensor([score for score, _ in known], dtype=torch.float32)
        return scores, torch.tensor([row for _, row in known], dtype=torch.int64)

    def close(self) -> None:
        """As `Engine.close`."""
        self.client.close()


def _claim(client: QdrantClient, gallery: Gallery, settings: dict[str, Any]) -> None:
    """Makes the collection, unless this index has done so before."""
    file, collection = gallery.index / CLAIM, settings["collection"]
    exists = client.collection_exists(collection)
    if exists and not (file.exists() and json.loads(file.read_bytes()) == settings):
        raise UserError(
            f"{settings['address']} has a collection {collection} that this index has not made, and would overwrite: "
            "give another name with --collection"
        )
    with atomic_file(file) as written:
        written.write(json.dumps(settings).encode())
    if exists and client.get_collection(collection).config.params.vectors.size != gallery.info.width:
        client.delete_collection(collection)  # of another checkpoint, which --overwrite has replaced
        exists = False
    if not exists:
        parameters = models.VectorParams(size=gallery.info.width, distance=models.Distance.COSINE)
        client.create_collection(collection, vectors_config=parameters)


def _versions(client: QdrantClient, collection: str) -> dict[str, str]:
    """The versions of all points, by id."""
    versions: dict[str, str] = {}
    offset = None
    while True:
        points, offset = client.scroll(collection, limit=IDS_AT_ONCE, offset=offset, with_payload=["version"])
        versions |= {str(point.id): point.payload["version"] for point in points}
        if offset is None:
            return versions


def _point_id(picture: Picture) -> str:
    return str(uuid.uuid5(NAMESPACE, picture.path))


def _version(gallery: Gallery, picture: Picture) -> str:
    return f"{gallery.info.fingerprint[:16]} {picture.size} {picture.modified}"


def _connect(address: str) -> QdrantClient:
    """A client of the server at a URL, or of the local mode in a folder. `QDRANT_API_KEY` is sent where it is set."""
    with _explained(address):
        if "://" not in address:
            return QdrantClient(path=address, force_disable_check_same_thread=True)
        key = os.environ.get("QDRANT_API_KEY") or None
        return QdrantClient(url=address, api_key=key, timeout=SECONDS, check_compatibility=False)


@contextmanager
def _connected(address: str) -> Iterator[QdrantClient]:
    client = _connect(address)
    try:
        with _explained(address):
            yield client
    finally:
        client.close()


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What the client raises as one clear line."""
    try:
        yield
    except (ApiException, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"Qdrant at {address} does not answer as it should ({reason}): see to it, then go on"
        ) from error
