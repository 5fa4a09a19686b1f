"""From the features of all ranks to named, weighted losses. Which losses are on is decided once, at construction."""

from collections.abc import Callable
from dataclasses import dataclass

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
        nitc, ritc, citc, ss, mlm, identity: weights of N-ITC, R-ITC, C-ITC, SS-I, MLM and ID.
        multi_view: N-ITC is the mean over two pool views (MVS-I).
        ritc_epsilon: ε of R-ITC.
        citc_in_modal, citc_cross_modal: λ1 and λ2 of C-ITC.
        ss_temperature: temperature of NT-Xent.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int = 0
    nitc: float = 1.0
    ritc: float = 1.0
    citc: float = 0.1
    ss: float = 0.4
    mlm: float = 0.0
    identity: float = 0.0
    multi_view: bool = True
    ritc_epsilon: float = 0.01
    citc_in_modal: float = 0.25
    citc_cross_modal: float = 0.25
    ss_temperature: float = 0.1

    @property
    def needs_second_view(self) -> bool:
        return self.multi_view and self.nitc > 0

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
        """N-ITC, R-ITC, C-ITC and SS-I, which compare the samples of a batch and need all B rows at once."""
        weighted = {}
        image = F.normalize(widened(features.image), dim=1)
        text = F.normalize(widened(features.text), dim=1)
        all_images, all_texts = self.gather(image), self.gather(text)

        if self.nitc > 0 or self.ritc > 0:
            targets = losses.matching_distribution(identities, self.gather(identities), image.dtype)
            logits = self._logits(features.scale, image, text, all_images, all_texts)
        if self.nitc > 0:
            loss = self._normalised(logits, targets, soft_label_ratio)
            if self.multi_view:
                second = F.normalize(widened(features.second_image), dim=1)
                second_logits = self._logits(features.scale, second, text, self.gather(second), all_texts)
                loss = (loss + self._normalised(second_logits, targets, soft_label_ratio)) / 2
            weighted["nitc"] = self.nitc * loss
        if self.ritc > 0:
            image_to_text, text_to_image = (
                losses.reversed_contrastive(direction, targets, self.ritc_epsilon) for direction in logits
            )
            weighted["ritc"] = self.ritc * (image_to_text + text_to_image) / 2
        if self.citc > 0:
            weighted["citc"] = self.citc * losses.cyclic_contrastive(
                all_images, all_texts, self.citc_in_modal, self.citc_cross_modal
            )
        if self.ss > 0:
            first, second = (F.normalize(widened(view), dim=1) for view in features.simclr)
            weighted["ss"] = self.ss * losses.nt_xent(
                first, second, self.gather(first), self.gather(second), self.rank * len(first), self.ss_temperature
            )
        return weighted

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

    @staticmethod
    def _logits(scale: Tensor, image: Tensor, text: Tensor, all_images: Tensor, all_texts: Tensor):
        """Scaled cosines, image to text and text to image, (B, G) each."""
        return scale * image @ all_texts.T, scale * text @ all_images.T

    @staticmethod
    def _normalised(logits: tuple[Tensor, Tensor], targets: Tensor, soft_label_ratio: float) -> Tensor:
        image_to_text, text_to_image = (
            losses.normalised_contrastive(direction, targets, soft_label_ratio) for direction in logits
        )
        return (image_to_text + text_to_image) / 2


def soft_label_ratio_at(step: int, steps_per_epoch: int, ratio: float) -> float:
    """α of N-ITC: grows linearly from 0 over the first epoch, then stays at `ratio`."""
    return ratio * min(1.0, step / steps_per_epoch)
