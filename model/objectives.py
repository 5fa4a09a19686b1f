"""From features to named, weighted losses.

Each loss is a row of a table at the end of this file. `CONTRASTIVE_TERMS` has the losses that compare the samples of a
batch, `PER_SAMPLE_TERMS` the losses that are computed for each sample separately. Their equations are in `losses.py`.

B rows of this rank, G rows of all ranks, L tokens, D width of the shared space.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import product
from operator import add
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from model import losses
from model.tbps_clip import Features, needed
from model.transformer import to_float32
from text_utils.masking import IGNORED_LABEL


@dataclass(frozen=True)
class Objectives:
    """The losses that are on, and their weights. A loss that is off computes nothing.

    The fields have the names of the keys in the configuration's section `experiment`: a switch turns a loss on, and its
    `_ratio` is its weight. A ratio of 0 also turns it off. N-ITC has no switch.

    Attributes:
        gather: (B, …) tensor of this rank → (G, …) of all ranks, in rank order, with gradient to every rank.
        rank: this process among those that `gather` joins; its rows start at row rank · B of the gathered tensor.
        nitc_ratio: weight of N-ITC, the normalised image-text contrastive loss.
        nitc_labels: `identity`: all samples of a person match; `pair`: only a sample's own pair matches (ITC).
        mvs_image: N-ITC is the mean over two augmented images (MVS-I).
        mvs_text: N-ITC is the mean over two augmented captions (MVS-T); with MVS-I, over all four combinations.
        ritc, ritc_ratio, ritc_eps: R-ITC, the reversed image-text contrastive loss, and its ε.
        citc, citc_ratio, citc_lambda1, citc_lambda2: C-ITC, the cyclic image-text contrastive loss, and the weights of
            its in-modal and its cross-modal part.
        ss, ss_text, ss_ratio, simclr_temperature: SS-I and SS-T, self-supervision between two views of an image or a
            caption, and the temperature of NT-Xent.
        mlm, mlm_ratio: masked language modelling.
        id, id_ratio: identity classification.
        sdm, sdm_ratio, sdm_scale, sdm_eps: SDM, IRRA's similarity distribution matching, its fixed scale of the cosines
            and its ε.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int = 0
    nitc_ratio: float = 1.0
    nitc_labels: str = "identity"
    mvs_image: bool = True
    mvs_text: bool = False
    ritc: bool = True
    ritc_ratio: float = 1.0
    ritc_eps: float = 0.01
    citc: bool = True
    citc_ratio: float = 0.1
    citc_lambda1: float = 0.25
    citc_lambda2: float = 0.25
    ss: bool = True
    ss_text: bool = False
    ss_ratio: float = 0.4
    simclr_temperature: float = 0.1
    mlm: bool = False
    mlm_ratio: float = 1.0
    id: bool = False
    id_ratio: float = 1.0
    sdm: bool = False
    sdm_ratio: float = 1.0
    sdm_scale: float = 50.0
    sdm_eps: float = 1e-8

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weight of each loss that is on, by name, in the order of computation."""
        weights = {}
        for name, term in (CONTRASTIVE_TERMS | PER_SAMPLE_TERMS).items():
            ratio = getattr(self, term.ratio)
            if getattr(self, name, True) and ratio > 0:
                weights[name] = ratio
        return weights

    @property
    def uses_temperature(self) -> bool:
        """Whether a loss that is on trains the temperature."""
        return any(CONTRASTIVE_TERMS[name].uses_temperature for name in self.weights if name in CONTRASTIVE_TERMS)

    @property
    def needs_second_view(self) -> bool:
        return self.mvs_image and "nitc" in self.weights

    @property
    def needs_second_caption(self) -> bool:
        return self.mvs_text and "nitc" in self.weights

    @property
    def needs_simclr_views(self) -> bool:
        return "ss" in self.weights

    @property
    def needs_simclr_captions(self) -> bool:
        return "ss_text" in self.weights

    @property
    def needs_masked_captions(self) -> bool:
        return "mlm" in self.weights

    def __call__(
        self,
        features: Features,
        identities: Tensor,
        soft_label_ratio: float,
        masked_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the weighted losses by name, each 0-dim float32. Training minimises their sum.

        Args:
            features: features of this rank's B rows.
            identities: (B,) int64.
            soft_label_ratio: α of N-ITC at this step.
            masked_labels: (B, L) int64, -100 for tokens that are not predicted (MLM).
        """
        weighted = self.contrast(features, identities, soft_label_ratio)
        picked = self.picked_tokens(masked_labels)
        return weighted | self.classify(features, identities, masked_labels, rows=len(identities), picked=picked)

    def contrast(self, features: Features, identities: Tensor, soft_label_ratio: float) -> dict[str, Tensor]:
        """Computes the losses that compare the samples of a batch; they need all B rows together."""
        image, text = normalise_rows(features.image), normalise_rows(features.text)
        all_images, all_texts = self.gather(image), self.gather(text)
        batch = Contrast(self, features, identities, soft_label_ratio, image, text, all_images, all_texts)
        return {
            name: self.weights[name] * term.compute(self, batch)
            for name, term in CONTRASTIVE_TERMS.items()
            if name in self.weights
        }

    def classify(
        self,
        features: Features,
        identities: Tensor,
        masked_labels: Tensor | None,
        *,
        rows: int,
        picked: Tensor | None,
    ) -> dict[str, Tensor]:
        """Computes the contribution of some rows to the losses that treat each sample separately.

        The contributions of all rows add up to the loss.

        Args:
            features, identities, masked_labels: tensors of some of the B rows.
            rows: B.
            picked: result of `picked_tokens` for all B rows.
        """
        part = BatchPart(features, identities, masked_labels, rows, picked)
        return {
            name: self.weights[name] * term.compute(self, part)
            for name, term in PER_SAMPLE_TERMS.items()
            if name in self.weights
        }

    def picked_tokens(self, masked_labels: Tensor | None) -> Tensor | None:
        """Counts the tokens that MLM predicts, as a mean over all ranks: 0-dim float32. Returns None without MLM."""
        if not self.needs_masked_captions:
            return None
        own = (needed(masked_labels) != IGNORED_LABEL).sum().float()
        return self.gather(own[None]).mean()


@dataclass(frozen=True)
class Contrast:
    """A batch for the contrastive losses. Tensors that only some losses need are computed on first use.

    Attributes:
        objectives: the losses; their `gather` joins the ranks.
        features: features of this rank's B rows.
        identities: (B,) int64.
        soft_label_ratio: α of N-ITC at this step.
        image, text: (B, D) float32, L2-normalised rows of this rank.
        all_images, all_texts: (G, D), these features of all ranks.
    """

    objectives: Objectives
    features: Features
    identities: Tensor
    soft_label_ratio: float
    image: Tensor
    text: Tensor
    all_images: Tensor
    all_texts: Tensor

    @cached_property
    def all_identities(self) -> Tensor:
        """The identities of all ranks: (G,) int64."""
        return self.objectives.gather(self.identities)

    @cached_property
    def matches(self) -> Tensor:
        """The matching distribution q̂, (B, G): each row is spread evenly over the columns with the same identity."""
        return losses.matching_distribution(self.identities, self.all_identities, self.image.dtype)

    @cached_property
    def cosines(self) -> tuple[Tensor, Tensor]:
        """The cosines from image to text and from text to image, each (B, G)."""
        return self.image @ self.all_texts.T, self.text @ self.all_images.T


class BatchPart(NamedTuple):
    """Some rows of a batch, for the losses that treat each sample separately.

    Attributes:
        features, identities, masked_labels: tensors of these rows.
        rows: B, the number of rows of the whole batch.
        picked: number of tokens that MLM predicts, mean over ranks: 0-dim; None without MLM.
    """

    features: Features
    identities: Tensor
    masked_labels: Tensor | None
    rows: int
    picked: Tensor | None


def normalise_rows(features: Tensor) -> Tensor:
    """L2-normalises rows in float32: (B, D) → (B, D)."""
    return F.normalize(to_float32(features), dim=1)


def total(weighted: Mapping[str, Tensor]) -> Tensor:
    """Adds up weighted losses by name, at least one: 0-dim."""
    return reduce(add, weighted.values())


def soft_label_ratio_at(step: int, steps_per_epoch: int, ratio: float) -> float:
    """Returns α of N-ITC: it grows linearly from 0 during the first epoch, then stays at `ratio`."""
    return ratio * min(1.0, step / steps_per_epoch)


# ---- the terms of the sum -------------------------------------------------------------------------------------------


def _nitc(objectives: Objectives, batch: Contrast) -> Tensor:
    """Computes N-ITC: the mean of both directions, over all combinations of an image and a caption view."""
    labels, cosines = batch.matches, batch.cosines
    if objectives.nitc_labels == "pair":
        rows = len(batch.identities)
        labels = losses.pair_distribution(rows, len(batch.all_identities), objectives.rank * rows, like=batch.image)
    images, texts = [(batch.image, batch.all_images)], [(batch.text, batch.all_texts)]
    if objectives.mvs_image:
        second = normalise_rows(needed(batch.features.second_image))
        images.append((second, objectives.gather(second)))
    if objectives.mvs_text:
        second = normalise_rows(needed(batch.features.second_text))
        texts.append((second, objectives.gather(second)))
    predicting_texts = texts
    if batch.features.soft_label_texts is not None:
        predicting_texts = [
            (row, objectives.gather(row)) for row in map(normalise_rows, batch.features.soft_label_texts)
        ]
    scale, views = batch.features.scale, []
    for number, (image, (text, predicting_text)) in enumerate(
        product(images, zip(texts, predicting_texts, strict=True))
    ):
        directions = cosines if number == 0 else _cosines(image, text)
        predicting = directions if predicting_text is text else _cosines(image, predicting_text)
        image_to_text, text_to_image = (
            losses.normalised_contrastive(scale * logits, labels, batch.soft_label_ratio, scale * predicting_logits)
            for logits, predicting_logits in zip(directions, predicting, strict=True)
        )
        views.append((image_to_text + text_to_image) / 2)
    return reduce(add, views) / len(views)


def _cosines(image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the cosines in both directions, each (B, G), of views given as rows of this rank and of all ranks."""
    return image[0] @ text[1].T, text[0] @ image[1].T


def _ritc(objectives: Objectives, batch: Contrast) -> Tensor:
    """Computes R-ITC: the mean of both directions."""
    image_to_text, text_to_image = (
        losses.reversed_contrastive(batch.features.scale * direction, batch.matches, objectives.ritc_eps)
        for direction in batch.cosines
    )
    return (image_to_text + text_to_image) / 2


def _sdm(objectives: Objectives, batch: Contrast) -> Tensor:
    """Computes SDM: the sum of both directions, as in IRRA."""
    image_to_text, text_to_image = (
        losses.reversed_contrastive(objectives.sdm_scale * direction, batch.matches, objectives.sdm_eps)
        for direction in batch.cosines
    )
    return image_to_text + text_to_image


def _citc(objectives: Objectives, batch: Contrast) -> Tensor:
    return losses.cyclic_contrastive(
        batch.all_images, batch.all_texts, objectives.citc_lambda1, objectives.citc_lambda2
    )


def _ss(objectives: Objectives, batch: Contrast) -> Tensor:
    return _self_supervised(objectives, needed(batch.features.simclr))


def _ss_text(objectives: Objectives, batch: Contrast) -> Tensor:
    return _self_supervised(objectives, needed(batch.features.simclr_text))


def _self_supervised(objectives: Objectives, views: tuple[Tensor, Tensor]) -> Tensor:
    first, second = map(normalise_rows, views)
    all_first, all_second = objectives.gather(first), objectives.gather(second)
    return losses.nt_xent(
        first, second, all_first, all_second, objectives.rank * len(first), objectives.simclr_temperature
    )


def _mlm(objectives: Objectives, part: BatchPart) -> Tensor:
    masked_labels = needed(part.masked_labels)
    labels = masked_labels[masked_labels != IGNORED_LABEL]
    return losses.masked_language(to_float32(needed(part.features.masked_logits)), labels, needed(part.picked))


def _id(objectives: Objectives, part: BatchPart) -> Tensor:
    image_logits, text_logits = map(to_float32, needed(part.features.identity_logits))
    return losses.identity(image_logits, text_logits, part.identities, part.rows)


class ContrastiveTerm(NamedTuple):
    """A loss that compares the samples of a batch.

    Attributes:
        compute: computes the unweighted loss of a batch, 0-dim.
        ratio: field of `Objectives` with its weight.
        uses_temperature: whether the loss trains the temperature.
    """

    compute: Callable[[Objectives, Contrast], Tensor]
    ratio: str
    uses_temperature: bool = False


class PerSampleTerm(NamedTuple):
    """A loss that treats each sample separately.

    Attributes:
        compute: computes the unweighted contribution of some rows, 0-dim.
        ratio: field of `Objectives` with its weight.
    """

    compute: Callable[[Objectives, BatchPart], Tensor]
    ratio: str


CONTRASTIVE_TERMS = {
    "nitc": ContrastiveTerm(_nitc, "nitc_ratio", uses_temperature=True),
    "ritc": ContrastiveTerm(_ritc, "ritc_ratio", uses_temperature=True),
    "sdm": ContrastiveTerm(_sdm, "sdm_ratio"),
    "citc": ContrastiveTerm(_citc, "citc_ratio"),
    "ss": ContrastiveTerm(_ss, "ss_ratio"),
    "ss_text": ContrastiveTerm(_ss_text, "ss_ratio"),
}
"""Terms by name, in the order of computation. The name is also the key that turns the loss on."""

PER_SAMPLE_TERMS = {
    "mlm": PerSampleTerm(_mlm, "mlm_ratio"),
    "id": PerSampleTerm(_id, "id_ratio"),
}
