"""Encodes a split over all ranks and ranks its images for each of its captions.

W ranks, Q queries (captions), N gallery images, D width of the shared space.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.datasets import Split
from misc.distributed import Processes, gather_strided
from misc.loader import EvaluationImages, batches, gallery_loader, pad_tokens
from misc.metrics import QueryResults, queries_without_match, rank_queries, summarise
from misc.precision import Precision
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer


@dataclass(frozen=True)
class Retrieval:
    """The outcome of an evaluation, the same on every rank.

    Attributes:
        metrics: `r1`, `r5`, `r10`, `mAP`, `mINP` in percent.
        without_match: number of queries whose person is not in the gallery.
        results: per query.
        queries: (Q, D) and gallery: (N, D) float32, L2-normalised.
    """

    metrics: dict[str, float]
    without_match: int
    results: QueryResults
    queries: Tensor
    gallery: Tensor

    def first_images(self, query: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and numbers of the `count` best gallery images of a query, best first."""
        similarity = self.gallery @ self.queries[query]
        order = similarity.argsort(descending=True, stable=True)[:count]
        return similarity[order], order


@dataclass(frozen=True)
class Evaluator:
    """Text-to-image retrieval on one split. The ranks share the encoding and the ranking.

    Attributes:
        split: what is evaluated.
        image_dir: folder of its images.
        tokenizer, text_length: how captions become ids.
        resolution: (height, width) in pixels.
        batch_size: per rank.
        workers: processes that decode images, per rank.
        processes: where this process stands.
        precision: of the encoders; similarities are computed in float32.
    """

    split: Split
    image_dir: Path
    tokenizer: Tokenizer
    text_length: int
    resolution: tuple[int, int]
    batch_size: int
    workers: int
    processes: Processes
    precision: Precision

    @torch.no_grad()
    def __call__(self, model: TBPSCLIP) -> Retrieval:
        was_training = model.training
        model.eval()
        gallery = gather_strided(self._encode_images(model), len(self.split.image_paths))
        own_queries = self._encode_captions(model)
        results = self._rank(own_queries, gallery)
        model.train(was_training)
        return Retrieval(
            metrics=summarise(results),
            without_match=queries_without_match(results),
            results=results,
            queries=gather_strided(own_queries, len(self.split)),
            gallery=gallery,
        )

    def _own(self, total: int) -> range:
        """What this rank encodes: every W-th of `total`, so that no item is encoded twice."""
        return range(self.processes.rank, total, self.processes.world_size)

    def _encode_images(self, model: TBPSCLIP) -> Tensor:
        device = self.processes.device
        images = EvaluationImages(self.split, self.image_dir, self.resolution, self._own(len(self.split.image_paths)))
        loader = gallery_loader(images, self.batch_size, workers=self.workers, pin_memory=device.type == "cuda")
        encoded = [self._encode(model.encode_image, batch.to(device, non_blocking=True)) for batch in batches(loader)]
        return torch.cat(encoded) if encoded else self._nothing(model)

    def _encode_captions(self, model: TBPSCLIP) -> Tensor:
        own = [self.split.captions[number] for number in self._own(len(self.split))]
        encoded = []
        for start in range(0, len(own), self.batch_size):
            ids = [self.tokenizer.encode(c, self.text_length) for c in own[start : start + self.batch_size]]
            encoded.append(self._encode(model.encode_text, pad_tokens(ids).to(self.processes.device)))
        return torch.cat(encoded) if encoded else self._nothing(model)

    def _encode(self, encoder, inputs: Tensor) -> Tensor:
        with self.precision.autocast():
            features = encoder(inputs)
        return F.normalize(features.float(), dim=1)

    def _nothing(self, model: TBPSCLIP) -> Tensor:
        """A rank beyond the last item still takes part in the gathers."""
        return torch.zeros(0, model.embed_dim, device=self.processes.device)

    def _rank(self, own_queries: Tensor, gallery: Tensor) -> QueryResults:
        device = self.processes.device
        identities = torch.tensor(self.split.caption_identities, device=device)[self._own(len(self.split))]
        own = rank_queries(own_queries, gallery, identities, torch.tensor(self.split.image_identities, device=device))
        total = len(self.split)
        return QueryResults(
            gather_strided(own.first_match, total),
            gather_strided(own.average_precision, total),
            gather_strided(own.inverse_negative_penalty, total),
        )
