"""Queries in, pictures of the index out.

Q queries, D width of the shared space.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from misc.data.images import read_image
from misc.errors import UserError
from misc.search import engines
from misc.search.encoder import Encoder
from misc.search.gallery import INFO, open_gallery

LONGEST_DESCRIPTION = 500
"""In characters; a CLIP reads 77 tokens, some 300 characters."""
NOT_IN_TEXT = ("Cc", "Cs")
"""Unicode's categories of control characters and halves of a surrogate pair."""


class Result(NamedTuple):
    """A picture that was found: its path below the folder, and its cosine with the query."""

    path: str
    score: float


@dataclass(frozen=True)
class Query:
    """What is looked for: exactly one of the first three.

    Attributes:
        description: in words.
        file: a picture anywhere.
        like: the path of a picture of the index.
        count: results that are wanted, and threshold: the lowest cosine that they may have.
    """

    description: str | None = None
    file: Path | None = None
    like: str | None = None
    count: int = 10
    threshold: float = -1.0


def checked_description(text: str) -> str:
    """A description as it is encoded. Raises UserError for one that is empty, too long, or holds control characters."""
    if len(text) > LONGEST_DESCRIPTION:
        raise UserError(f"the description has {len(text):,} characters: {LONGEST_DESCRIPTION} are the most")
    if bad := [each for each in text if unicodedata.category(each) in NOT_IN_TEXT and each not in "\t\r\n"]:
        raise UserError(f"the description holds U+{ord(bad[0]):04X}, which is not a character to read: remove it")
    if not text.strip():
        raise UserError("the description is empty: say whom to look for, as in: a woman in a red coat")
    return " ".join(text.split())


class Searcher:
    """Searches an index, and follows it to its newest generation.

    Attributes:
        folder: that was indexed.
        index: its index.
        encoder: of queries; the one that the index was made with.
        gallery: the generation that is searched.
        engine: that searches it.
    """

    def __init__(self, folder: Path, index: Path, encoder: Encoder, engine: str | None = None):
        self.folder, self.index, self.encoder = folder, index, encoder
        self._engine_wanted = engine
        self._open()

    @property
    def engine_name(self) -> str:
        """Of the engine that searches."""
        return self._engine_wanted or self.gallery.info.engine["name"]

    def _open(self) -> None:
        stamp = self._stamp()
        try:
            gallery = open_gallery(self.index)
            if gallery.info.fingerprint != self.encoder.fingerprint:
                raise UserError(
                    f"{self.index} was made with another checkpoint ({gallery.info.checkpoint}): give that one"
                )
            engine = engines.open_engine(gallery, self._engine_wanted)
        except UserError:
            if self._stamp() == stamp:
                raise
            return self._open()  # a new generation has just taken its place
        # Together and last: if anything above failed, the next search tries again.
        self._seen, self.gallery, self.engine = stamp, gallery, engine
        return None

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = (self.index / INFO).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def refresh(self) -> None:
        """Goes over to a newer generation, if there is one. Raises UserError where the index is gone or another's."""
        if self._stamp() != self._seen:
            self.engine.close()
            self._open()

    def search(self, queries: Sequence[Query]) -> list[list[Result] | UserError]:
        """The results of each query, best first; a query that cannot be answered gives the reason instead.

        What is asked at once is encoded and compared at once.
        """
        self.refresh()
        features = self._features(queries)
        answerable = [number for number, feature in enumerate(features) if isinstance(feature, Tensor)]
        answers: list[list[Result] | UserError] = list(features)
        if answerable:
            most = min(max(queries[number].count for number in answerable), len(self.gallery))
            found = self.engine.search(torch.stack([features[number] for number in answerable]), most)
            for number, (scores, rows) in zip(answerable, found, strict=True):
                answers[number] = self._results(queries[number], scores, rows)
        return answers

    def _features(self, queries: Sequence[Query]) -> list[Tensor | UserError]:
        """(D,) of each query, or why it has none."""
        described = [query.description for query in queries if query.description is not None]
        encoded = iter(self.encoder.encode_descriptions(described) if described else ())
        return [self._of_picture(query) if query.description is None else next(encoded) for query in queries]

    def _of_picture(self, query: Query) -> Tensor | UserError:
        if query.file is None:
            row = self.gallery.row_of(query.like)
            return UserError(f"{query.like} is not in the index") if row is None else self.gallery.features[row]
        try:
            pixels = self.encoder.view(read_image(query.file, upright=True))
        except UserError as error:
            return error
        return self.encoder.encode_pictures(pixels[None])[0]

    def _results(self, query: Query, scores: Tensor, rows: Tensor) -> list[Result]:
        pairs = zip(scores[: query.count].tolist(), rows[: query.count].tolist(), strict=True)
        return [Result(self.gallery.picture(row).path, score) for score, row in pairs if score >= query.threshold]
