"""From the features of all ranks to named, weighted losses. Which losses are on is decided once, at construction."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch.nn.functional as F
from torch import Tensor

from model import losses
from model.tbps_clip import Features
from model.transformer import widened
from text_utils.masking import IGNORED_LABEL


@dataclass(frozen=True)
class Objectives:
    """The weighted sum of SPEC section 5; a loss whose weight is 0 is off and computes nothing.

    Attributes:
        gather: (B, …) tensor of this rank → (G, …) of all ranks, in rank order, with gradient to every rank.
        rank: of this process among those that `gather` joins; its rows begin at rank · B of the gathered ones.
        nitc, ritc, citc, ss, ss_text, mlm, identity, sdm: weights of N-ITC, R-ITC, C-ITC, SS-I, SS-T, MLM, ID and SDM.
        pair_labels: N-ITC becomes ITC: of each row, its own pair alone matches.
        multi_view: N-ITC is the mean over two pool views (MVS-I).
        multi_view_text: N-ITC is the mean over two augmented captions (MVS-T); of both, over all four combinations.
        ritc_epsilon: ε of R-ITC.
        citc_in_modal, citc_cross_modal: λ1 and λ2 of C-ITC.
        ss_temperature: temperature of NT-Xent.
        sdm_scale, sdm_epsilon: fixed scale of the cosines in SDM, and what is added to its labels.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int = 0
    nitc: float = 1.0
    ritc: float = 1.0
    citc: float = 0.1
    ss: float = 0.4
    mlm: float = 0.0
    identity: float = 0.0
    ss_text: float = 0.0
    sdm: float = 0.0
    pair_labels: bool = False
    multi_view: bool = True
    multi_view_text: bool = False
    ritc_epsilon: float = 0.01
    citc_in_modal: float = 0.25
    citc_cross_modal: float = 0.25
    ss_temperature: float = 0.1
    sdm_scale: float = 50.0
    sdm_epsilon: float = 1e-8

    @property
    def uses_temperature(self) -> bool:
        return self.nitc > 0 or self.ritc > 0

    @property
    def needs_second_view(self) -> bool:
        return self.multi_view and self.nitc > 0

    @property
    def needs_second_caption(self) -> bool:
        return self.multi_view_text and self.nitc > 0

    @property
    def needs_simclr_captions(self) -> bool:
        return self.ss_text > 0

    @property
    def needs_simclr_views(self) -> bool:
        return self.ss > 0

    @property
    def needs_masked_captions(self) -> bool:
        return self.mlm > 0

    def __call__(
        self,
        features: Features,
        identities: Tensor,
        soft_label_ratio: float,
        masked_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses by name, 0-dim float32; their sum is what is trained.

        Args:
            features: of this rank's B rows.
            identities: (B,) int64.
            soft_label_ratio: α of N-ITC at this step.
            masked_labels: (B, L) int64, -100 where nothing is predicted (MLM).
        """
        weighted = self.contrast(features, identities, soft_label_ratio)
        picked = self.picked_tokens(masked_labels)
        return weighted | self.classify(features, identities, masked_labels, rows=len(identities), picked=picked)

    def contrast(self, features: Features, identities: Tensor, soft_label_ratio: float) -> dict[str, Tensor]:
        """N-ITC, R-ITC, C-ITC, SS-I, SS-T and SDM, which compare the samples of a batch and need all B rows at once."""
        weighted = {}
        image, text = _normalised(features.image), _normalised(features.text)
        all_images, all_texts = self.gather(image), self.gather(text)

        if self.nitc > 0 or self.ritc > 0 or self.sdm > 0:
            all_identities = self.gather(identities)
            targets = losses.matching_distribution(identities, all_identities, image.dtype)
            cosines = (image @ all_texts.T, text @ all_images.T)
        if self.nitc > 0:
            labels = targets
            if self.pair_labels:
                start = self.rank * len(identities)
                labels = losses.pair_distribution(len(identities), len(all_identities), start, like=image)
            images, texts = [(image, all_images)], [(text, all_texts)]
            if self.multi_view:
                second = _normalised(features.second_image)
                images.append((second, self.gather(second)))
            if self.multi_view_text:
                second = _normalised(features.second_text)
                texts.append((second, self.gather(second)))
            views = [
                self._normalised_contrastive(
                    cosines if number == 0 else (own_image @ every_text.T, own_text @ every_image.T),
                    features.scale,
                    labels,
                    soft_label_ratio,
                )
                for number, ((own_image, every_image), (own_text, every_text)) in enumerate(product(images, texts))
            ]
            weighted["nitc"] = self.nitc * sum(views) / len(views)
        if self.ritc > 0:
            image_to_text, text_to_image = (
                losses.reversed_contrastive(features.scale * direction, targets, self.ritc_epsilon)
                for direction in cosines
            )
            weighted["ritc"] = self.ritc * (image_to_text + text_to_image) / 2
        if self.sdm > 0:
            image_to_text, text_to_image = (
                losses.reversed_contrastive(self.sdm_scale * direction, targets, self.sdm_epsilon)
                for direction in cosines
            )
            weighted["sdm"] = self.sdm * (image_to_text + text_to_image)
        if self.citc > 0:
            weighted["citc"] = self.citc * losses.cyclic_contrastive(
                all_images, all_texts, self.citc_in_modal, self.citc_cross_modal
            )
        if self.ss > 0:
            weighted["ss"] = self.ss * self._self_supervised(features.simclr)
        if self.ss_text > 0:
            weighted["ss_text"] = self.ss_text * self._self_supervised(features.simclr_text)
        return weighted

    def _self_supervised(self, views: tuple[Tensor, Tensor]) -> Tensor:
        first, second = map(_normalised, views)
        return losses.nt_xent(
            first, second, self.gather(first), self.gather(second), self.rank * len(first), self.ss_temperature
        )

    @staticmethod
    def _normalised_contrastive(
        cosines: tuple[Tensor, Tensor], scale: Tensor, labels: Tensor, soft_label_ratio: float
    ) -> Tensor:
        """Mean of both directions."""
        image_to_text, text_to_image = (
            losses.normalised_contrastive(scale * direction, labels, soft_label_ratio) for direction in cosines
        )
        return (image_to_text + text_to_image) / 2

    def classify(
        self,
        features: Features,
        identities: Tensor,
        masked_labels: Tensor | None,
        *,
        rows: int,
        picked: Tensor | None,
    ) -> dict[str, Tensor]:
        """MLM and ID, which look at each sample alone: the parts that any rows contribute, whose sum is the loss.

        Args:
            features, identities, masked_labels: of some of the B rows.
            rows: B.
            picked: of `picked_tokens` for all B rows.
        """
        weighted = {}
        if self.mlm > 0:
            labels = masked_labels[masked_labels != IGNORED_LABEL]
            weighted["mlm"] = self.mlm * losses.masked_language(widened(features.masked_logits), labels, picked)
        if self.identity > 0:
            image_logits, text_logits = map(widened, features.identity_logits)
            weighted["id"] = self.identity * losses.identity(image_logits, text_logits, identities, rows)
        return weighted

    def picked_tokens(self, masked_labels: Tensor | None) -> Tensor | None:
        """Tokens that MLM predicts on a rank, on average over all ranks: 0-dim; None without MLM."""
        if self.mlm == 0:
            return None
        own = (masked_labels != IGNORED_LABEL).sum().float()
        return self.gather(own[None]).mean()


def _normalised(features: Tensor) -> Tensor:
    """L2-normalised rows in float32."""
    return F.normalize(widened(features), dim=1)


def soft_label_ratio_at(step: int, steps_per_epoch: int, ratio: float) -> float:
    """α of N-ITC: grows linearly from 0 over the first epoch, then stays at `ratio`."""
    return ratio * min(1.0, step / steps_per_epoch)
