"""Search on a Qdrant server, for more features than one machine can search.

The index with its features stays on the disk, and a collection of the server is a copy of it. Each point is a picture.
Its id is computed from the path; its payload contains `path` and `version`, which shows whether the point is current.

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
TIMEOUT_SECONDS = 60
"""Longest time to wait for an answer of the server."""
NAMESPACE = uuid.UUID("c6f9b6b1-4a55-5d0c-9b86-0f2f6b1f6d4e")
CLAIM = "qdrant.json"
"""File in the index that records the collection that this index has created, and so may change."""


def check(choice: EngineChoice) -> None:
    """Checks that a Qdrant server answers at the address.

    Raises UserError if the address is invalid or no server answers there.
    """
    address = choice.address
    if address is None or ("://" not in address and ":" in Path(address).name):
        given = "give the address of the server" if address is None else f"{address} is not an address"
        raise UserError(f"--engine qdrant: {given}, for example --qdrant http://HOST:6333")
    with _connected(address) as client:
        client.get_collections()


def build(gallery: Gallery, choice: EngineChoice) -> tuple[dict[str, Any], list[str]]:
    """Updates the collection: sends the new and changed pictures of the gallery, and deletes those that are not in it.

    Returns: the settings of the engine, and lines for the user.

    Raises UserError if the server cannot be reached or refuses, or this index has not created the collection.
    """
    address, collection = choice.address, choice.collection or gallery.index.name
    assert address is not None  # see `check`
    settings = {"name": "qdrant", "address": address, "collection": collection}
    with _connected(address) as client:
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
        gone: list[models.ExtendedPointId] = list(versions)
        for start in range(0, len(gone), IDS_AT_ONCE):
            client.delete(collection, models.PointIdsList(points=gone[start : start + IDS_AT_ONCE]))
    return settings, [f"{address}, collection {collection}: {sent:,} pictures sent, {len(gone):,} deleted"]


class Qdrant:
    """An `Engine` that searches the collection that `build` has filled.

    Raises UserError if the server cannot be reached, or the collection does not exist.
    """

    def __init__(self, gallery: Gallery, choice: EngineChoice):
        assert choice.address is not None and choice.collection is not None  # `build` records both
        self.gallery, self.address, self.collection = gallery, choice.address, choice.collection
        self.client = _connect(self.address)
        with _client_errors(self.address):
            if not self.client.collection_exists(self.collection):
                raise UserError(f"{self.address} has no collection {self.collection}: index the folder again")

    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """See `Engine.search`. Pictures that only a newer generation contains are left out."""
        requests = [models.QueryRequest(query=query.tolist(), limit=count, with_payload=["path"]) for query in queries]
        with _client_errors(self.address):
            answers = self.client.query_batch_points(self.collection, requests)
        return [self._found(answer.points) for answer in answers]

    def _found(self, points: list[models.ScoredPoint]) -> tuple[Tensor, Tensor]:
        # Another program may have written other points into the collection.
        paths = [_payload(point).get("path") for point in points]
        rows = [self.gallery.row_of(path) if isinstance(path, str) else None for path in paths]
        pairs = [(point.score, row) for point, row in zip(points, rows, strict=True)]
        known = [(score, row) for score, row in pairs if row is not None]
        scores = torch.tensor([score for score, _ in known], dtype=torch.float32)
        return scores, torch.tensor([row for _, row in known], dtype=torch.int64)

    def close(self) -> None:
        """See `Engine.close`."""
        self.client.close()


def _claimed(file: Path) -> Any:
    """Returns the settings of the collection that an index has created; None if they are missing or damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _claim(client: QdrantClient, gallery: Gallery, settings: dict[str, Any]) -> None:
    """Creates the collection, unless this index has already created it.

    Raises UserError if the collection exists and this index has not created it.
    """
    file, collection = gallery.index / CLAIM, settings["collection"]
    exists = client.collection_exists(collection)
    if exists and _claimed(file) != settings:
        raise UserError(
            f"{settings['address']}: the collection {collection} exists, but was not created by this index: "
            "give another name with --collection"
        )
    with atomic_file(file) as written:
        written.write(json.dumps(settings).encode())
    if exists and _width(client, collection) != gallery.info.width:
        client.delete_collection(collection)  # its features are from a checkpoint that --overwrite has replaced
        exists = False
    if not exists:
        parameters = models.VectorParams(size=gallery.info.width, distance=models.Distance.COSINE)
        client.create_collection(collection, vectors_config=parameters)


def _width(client: QdrantClient, collection: str) -> int:
    """Returns the width of the features in a collection that this index has created."""
    vectors = client.get_collection(collection).config.params.vectors
    assert isinstance(vectors, models.VectorParams)
    return vectors.size


def _versions(client: QdrantClient, collection: str) -> dict[str, str]:
    """Returns the version of each point, by its id."""
    versions: dict[str, str] = {}
    offset = None
    while True:
        points, offset = client.scroll(collection, limit=IDS_AT_ONCE, offset=offset, with_payload=["version"])
        versions |= {str(point.id): _payload(point)["version"] for point in points}
        if offset is None:
            return versions


def _payload(point: models.ScoredPoint | models.Record) -> dict[str, Any]:
    """Returns the payload of a point that was requested with it."""
    assert point.payload is not None
    return point.payload


def _point_id(picture: Picture) -> str:
    return str(uuid.uuid5(NAMESPACE, picture.path))


def _version(gallery: Gallery, picture: Picture) -> str:
    return f"{gallery.info.fingerprint[:16]} {picture.size} {picture.modified}"


def _connect(address: str) -> QdrantClient:
    """Connects to the server at a URL, or opens a folder in local mode. Sends `QDRANT_API_KEY` if it is set.

    Raises UserError if the client refuses the address.
    """
    with _client_errors(address):
        if "://" not in address:
            return QdrantClient(path=address, force_disable_check_same_thread=True)
        key = os.environ.get("QDRANT_API_KEY") or None
        return QdrantClient(url=address, api_key=key, timeout=TIMEOUT_SECONDS, check_compatibility=False)


@contextmanager
def _connected(address: str) -> Iterator[QdrantClient]:
    """Provides a client, which is closed when the context ends.

    Raises UserError if the server cannot be reached or refuses.
    """
    client = _connect(address)
    try:
        with _client_errors(address):
            yield client
    finally:
        client.close()


@contextmanager
def _client_errors(address: str) -> Iterator[None]:
    """Turns the exceptions of the client into a `UserError` of one line."""
    try:
        yield
    except (ApiException, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"Qdrant at {address} does not answer correctly ({reason}): check the server, then run the command again"
        ) from error
