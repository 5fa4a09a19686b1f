"""Searches an index: takes queries, and returns pictures of the index.

Q queries, D width of the shared space.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from misc.data.images import ImageError, read_image
from misc.errors import UserError
from misc.retrieval.metrics import check_features
from misc.search import engines
from misc.search.encoder import Encoder
from misc.search.gallery import INFO, open_gallery

LONGEST_DESCRIPTION = 500
"""In characters; CLIP reads at most 77 tokens, which are about 300 characters."""
NOT_IN_TEXT = ("Cc", "Cs")
"""Unicode's categories of control characters and halves of a surrogate pair."""


class Result(NamedTuple):
    """A picture that was found: its path relative to the folder, and its cosine with the query."""

    path: str
    score: float


@dataclass(frozen=True)
class Query:
    """A query: a description, a picture file or a picture of the index. Exactly one of these three is set.

    Attributes:
        description: a description in words.
        file: any picture file.
        like: the path of a picture in the index.
        count: largest number of results.
    """

    description: str | None = None
    file: Path | None = None
    like: str | None = None
    count: int = 10


def checked_description(text: str) -> str:
    """Checks a description, and returns it with single spaces between its words.

    Raises UserError if it is empty, too long, or contains control characters.
    """
    if len(text) > LONGEST_DESCRIPTION:
        raise UserError(f"the description has {len(text):,} characters: shorten it to at most {LONGEST_DESCRIPTION}")
    if bad := [each for each in text if unicodedata.category(each) in NOT_IN_TEXT and each not in "\t\r\n"]:
        raise UserError(f"the description contains the control character U+{ord(bad[0]):04X}: remove it")
    if not text.strip():
        raise UserError("the description is empty: describe a person, for example: a woman in a red coat")
    return " ".join(text.split())


class Searcher:
    """Searches the newest generation of an index.

    Attributes:
        folder: folder of pictures that was indexed.
        index: folder of the index.
        encoder: encodes the queries; the index was built with it.
        gallery: generation that is searched.
        engine: searches the gallery.

    Args:
        engine: `exact` for exact search. None: the engine of the index.
        qdrant: address of Qdrant, which an index that was built for it needs.

    Raises UserError if the index cannot be opened, or was built with another encoder.
    """

    def __init__(
        self, folder: Path, index: Path, encoder: Encoder, engine: str | None = None, qdrant: str | None = None
    ):
        self.folder, self.index, self.encoder = folder, index, encoder
        self._engine_wanted, self._qdrant = engine, qdrant
        self._open()

    @property
    def engine_name(self) -> str:
        """The name of the engine that searches."""
        return self._engine_wanted or self.gallery.info.engine["name"]

    def _open(self) -> None:
        stamp = self._stamp()
        try:
            gallery = open_gallery(self.index)
            if gallery.info.fingerprint != self.encoder.fingerprint:
                raise UserError(
                    f"{self.index} was built with another checkpoint: use --checkpoint {gallery.info.checkpoint}, or "
                    "index the folder again with --overwrite"
                )
            engine = engines.open_engine(gallery, self._engine_wanted, self._qdrant)
        except UserError:
            if self._stamp() == stamp:
                raise
            return self._open()  # a new generation has just replaced it
        # All three together, at the end: if a line above fails, the next search tries again.
        self._seen, self.gallery, self.engine = stamp, gallery, engine
        return None

    def _stamp(self) -> tuple[int, int] | None:
        """Returns a value that changes with each new generation."""
        try:
            status = (self.index / INFO).stat()
        except OSError:  # opening the index reports it
            return None
        return status.st_mtime_ns, status.st_ino

    def refresh(self) -> None:
        """Opens a newer generation, if there is one.

        Raises UserError if the index was removed, damaged, or replaced by that of another checkpoint.
        """
        if self._stamp() != self._seen or self.gallery.has_changed():
            self.engine.close()
            self._open()

    def notice(self, query: Query) -> str | None:
        """Returns a message if the model does not read all of a description, else None."""
        read = None if query.description is None else self.encoder.read_part(query.description)
        if read is None:
            return None
        last = " ".join(read.split()[-3:])
        return f"the model reads {self.encoder.text_length} tokens of a description: what follows “{last}” is ignored"

    def search(self, queries: Sequence[Query]) -> list[list[Result] | UserError]:
        """Answers several queries, which are encoded and compared together.

        Returns: for each query, its results, best first; or a UserError if the query cannot be answered.

        Raises UserError if the index or its engine cannot be used.
        """
        self.refresh()
        features = self._features(queries)
        answerable = {number: feature for number, feature in enumerate(features) if isinstance(feature, Tensor)}
        answers: list[list[Result] | UserError] = [[] if isinstance(each, Tensor) else each for each in features]
        if answerable:
            most = min(max(queries[number].count for number in answerable), len(self.gallery))
            found = self.engine.search(torch.stack(list(answerable.values())), most)
            for number, (scores, rows) in zip(answerable, found, strict=True):
                answers[number] = self._results(queries[number], scores, rows)
        return answers

    def _features(self, queries: Sequence[Query]) -> list[Tensor | UserError]:
        """Returns the feature (D,) of each query, or a UserError if the query has none."""
        described = [query.description for query in queries if query.description is not None]
        encoded = self.encoder.encode_descriptions(described) if described else torch.empty(0, self.encoder.width)
        check_features(encoded, [f"the description {each!r}" for each in described])
        rows = iter(encoded)
        return [self._picture_feature(query) if query.description is None else next(rows) for query in queries]

    def _picture_feature(self, query: Query) -> Tensor | UserError:
        if query.like is not None:
            row = self.gallery.row_of(query.like)
            return UserError(f"{query.like} is not in the index") if row is None else self.gallery.features[row]
        assert query.file is not None
        try:
            pixels = self.encoder.view(read_image(query.file, upright=True))
            features = self.encoder.encode_pictures(pixels[None])
            check_features(features, [f"the image {query.file}"])
        except ImageError as error:
            return UserError(f"the image {query.file} cannot be read ({error.reason}): give another file")
        except UserError as error:
            return error
        return features[0]

    def _results(self, query: Query, scores: Tensor, rows: Tensor) -> list[Result]:
        pairs = zip(scores[: query.count].tolist(), rows[: query.count].tolist(), strict=True)
        return [Result(self.gallery.picture(row).path, score) for score, row in pairs]
