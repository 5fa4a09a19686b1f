"""Encodes a split on all ranks, and ranks its images for each of its captions.

W ranks, Q queries (captions), N gallery images, D width of the shared space.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.data.batches import batches, gallery_loader, pad_tokens
from misc.data.images import damaged_warning
from misc.data.samples import EvaluationImages
from misc.data.split import Split
from misc.retrieval.metrics import QueryResults, check_features, queries_without_match, rank_queries, summarise
from misc.system.distributed import Ranks, gather_strided
from misc.system.precision import Precision
from misc.system.prefetch import prefetched
from model.preprocessing import TBPS_PREPROCESSING, Preprocessing
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer

EncodeFunction = Callable[[Tensor], Tensor]
"""A function from a batch to features (B, D), not L2-normalised."""


@dataclass(frozen=True)
class Retrieval:
    """The result of an evaluation, the same on every rank.

    Attributes:
        metrics: `r1`, `r5`, `r10`, `mAP`, `mINP` in percent.
        without_match: number of queries whose person is not in the gallery.
        results: the ranking of each query.
        queries: (Q, D) and gallery: (N, D), features in float32, L2-normalised.
        seconds: duration of the evaluation.
        damaged: image files that could only be decoded in part.
    """

    metrics: dict[str, float]
    without_match: int
    results: QueryResults
    queries: Tensor
    gallery: Tensor
    seconds: float = 0.0
    damaged: list[str] = field(default_factory=list)

    def first_images(self, query: int, count: int) -> tuple[Tensor, Tensor]:
        """Returns the cosines and the numbers of the `count` best gallery images of a query, best first."""
        similarity = self.gallery @ self.queries[query]
        order = similarity.argsort(descending=True, stable=True)[:count]
        return similarity[order], order


def result_lines(title: str, retrieval: Retrieval) -> list[str]:
    """Returns the table of results as lines for the log."""
    lines = [
        f"{title}: {len(retrieval.queries)} queries, {len(retrieval.gallery)} images, {retrieval.seconds:.1f} s",
        "    R@1    R@5   R@10    mAP   mINP",
        "".join(f"{value:7.2f}" for value in retrieval.metrics.values()),
    ]
    if retrieval.without_match:
        lines.append(f"warning: {retrieval.without_match} queries describe a person who is not in the gallery")
    if retrieval.damaged:
        lines.append(damaged_warning(retrieval.damaged))
    return lines


@dataclass(frozen=True)
class Evaluator:
    """Text-to-image retrieval on one split. The ranks share the encoding and the ranking.

    Attributes:
        split: the split to evaluate.
        image_dir: folder of its images.
        tokenizer, text_length: encode a caption to at most `text_length` token ids.
        resolution: (height, width) in pixels.
        batch_size: per rank.
        workers: number of processes that decode images, per rank.
        ranks: this rank and its collectives.
        precision: of the encoders; similarities are computed in float32.
        preprocessing: preprocessing of images and captions; images are never cropped.
    """

    split: Split
    image_dir: Path
    tokenizer: Tokenizer
    text_length: int
    resolution: tuple[int, int]
    batch_size: int
    workers: int
    ranks: Ranks
    precision: Precision
    preprocessing: Preprocessing = TBPS_PREPROCESSING

    @torch.no_grad()
    def __call__(self, model: TBPSCLIP) -> Retrieval:
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        damaged: list[str] = []
        (own_images,) = self.encode_images([model.encode_image], model.embed_dim, damaged)
        (own_queries,) = self.encode_captions([model.encode_text], model.embed_dim)
        gallery = gather_strided(own_images, len(self.split.image_paths))
        results = self.rank(own_queries, gallery)
        queries = gather_strided(own_queries, len(self.split))
        model.train(was_training)
        return Retrieval(
            metrics=summarise(results),
            without_match=queries_without_match(results),
            results=results,
            queries=queries,
            gallery=gallery,
            seconds=time.perf_counter() - started,
            damaged=self.ranks.all_gather_list(damaged),
        )

    @torch.no_grad()
    def encode_images(
        self, encoders: Sequence[EncodeFunction], width: int, damaged: list[str] | None = None
    ) -> list[Tensor]:
        """Encodes this rank's gallery images with each encoder. Images are decoded once for all encoders.

        Args:
            encoders: (B, 3, H, W) → (B, D).
            width: D.
            damaged: receives the paths of files that could only be decoded in part.

        Returns: for each encoder (n, D) float32, L2-normalised, in the order that `gather_strided` takes.

        Raises UserError if an image cannot be decoded, or the feature of one is not finite.
        """
        device = self.ranks.device
        own = self._own(len(self.split.image_paths))
        images = EvaluationImages(self.split, self.image_dir, self.resolution, own, self.preprocessing)
        loader = gallery_loader(images, self.batch_size, workers=self.workers, pin_memory=device.type == "cuda")
        names = [f"the image {self.image_dir / self.split.image_paths[number]}" for number in own]

        def pixels() -> Iterator[Tensor]:
            for batch in batches(loader):
                if damaged is not None:
                    damaged.extend(batch.damaged)
                yield batch.pixels

        return self._encode(encoders, pixels(), width, names)

    @torch.no_grad()
    def encode_captions(self, encoders: Sequence[EncodeFunction], width: int) -> list[Tensor]:
        """Encodes this rank's captions like `encode_images`. Encoders: (B, L) int64 → (B, D)."""
        captions = self.split.captions if self.preprocessing.clean_captions else self.split.annotated_captions
        own = [captions[number] for number in self._own(len(self.split))]
        token_ids = (
            pad_tokens([self.tokenizer.encode(c, self.text_length) for c in own[start : start + self.batch_size]])
            for start in range(0, len(own), self.batch_size)
        )
        return self._encode(encoders, token_ids, width, [f"the caption {caption!r}" for caption in own])

    def rank(self, own_queries: Tensor, gallery: Tensor) -> QueryResults:
        """Ranks the gallery for each query.

        Args:
            own_queries: features of this rank's captions, from `encode_captions`.
            gallery: (N, D), features of the images of all ranks.

        Returns: the results of the queries of all ranks, the same on every rank.
        """
        device = self.ranks.device
        identities = torch.tensor(self.split.caption_identities, device=device)[self._own(len(self.split))]
        own = rank_queries(own_queries, gallery, identities, torch.tensor(self.split.image_identities, device=device))
        total = len(self.split)
        return QueryResults(
            gather_strided(own.first_match, total),
            gather_strided(own.average_precision, total),
            gather_strided(own.inverse_negative_penalty, total),
        )

    def _own(self, total: int) -> range:
        """Returns the items that this rank encodes: every W-th of `total`, so that no item is encoded twice."""
        return range(self.ranks.rank, total, self.ranks.world_size)

    def _encode(
        self, encoders: Sequence[EncodeFunction], inputs: Iterable[Tensor], width: int, names: Sequence[str]
    ) -> list[Tensor]:
        device = self.ranks.device
        nothing = torch.zeros(0, width, device=device)  # a rank beyond the last item still takes part in the gathers
        features = [[nothing] for _ in encoders]
        for batch in prefetched(inputs, device, lambda batch: batch.to(device, non_blocking=True)):
            for encoder, encoded in zip(encoders, features, strict=True):
                with self.precision.autocast():
                    raw = encoder(batch)
                encoded.append(F.normalize(raw.float(), dim=1))
        together = [torch.cat(encoded) for encoded in features]
        remedy = "use other weights" + (", or set misc.precision=fp32" if self.precision.name != "fp32" else "")
        for each in together:
            check_features(each, names, remedy)
        return together
