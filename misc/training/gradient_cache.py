"""Gradients of a batch that is too large for the GPU memory: the batch is encoded chunk by chunk.

Gradient caching (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). The
contrastive losses need the features of all B rows of this rank at the same time, but not the encoders' activations.

1. Encode each chunk without gradients and keep its features.
2. Compute the losses of all features, and their gradients with respect to the features.
3. Encode each chunk again with the same dropout, and backpropagate the gradients of its features.
   Losses that compare no samples (MLM, ID) are computed here, so that their logits never exist for the whole batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from misc.data.batches import Batch
from misc.system.prefetch import prefetched
from model.objectives import Objectives, total
from model.tbps_clip import Features, Views


def backward_in_chunks(
    batch: Batch,
    chunk_size: int,
    *,
    device: torch.device,
    encode: Callable[[Views, int, bool], Features],
    objectives: Objectives,
    soft_label_ratio: float,
    scale_loss: Callable[[Tensor], Tensor],
    without_reduction: Callable[[], AbstractContextManager],
) -> dict[str, Tensor]:
    """Adds the gradients of the whole batch to those of the parameters, like a single pass over the batch.

    Args:
        batch: B samples of this rank, on any device.
        chunk_size: number of rows that are on the device, and encoded, at the same time.
        device: the device of the encoders.
        encode: views and number of a chunk, and whether features for soft labels are needed → features; the same
            number must give the same dropout.
        objectives: the losses.
        soft_label_ratio: α of N-ITC.
        scale_loss: scales a loss like the gradient scaler.
        without_reduction: returns a context in which ranks do not average their gradients. They average them once, for
            the last chunk.

    Returns: weighted losses by name, detached.
    """
    chunks = [batch.rows(start, start + chunk_size) for start in range(0, len(batch), chunk_size)]
    identities = batch.identities.to(device, non_blocking=True)
    labels = batch.views.masked_labels
    picked = objectives.picked_tokens(labels.to(device, non_blocking=True) if labels is not None else None)

    def on_device() -> Iterator[Batch]:
        return prefetched(chunks, device, lambda chunk: chunk.to(device))

    with torch.no_grad():
        parts = [
            _contrastive_features(encode(_without_masked_captions(chunk.views), number, soft_label_ratio > 0))
            for number, chunk in enumerate(on_device())
        ]
    whole = _concatenate(parts)
    weighted = objectives.contrast(whole, identities, soft_label_ratio)
    scale_loss(total(weighted)).backward()
    weighted = {name: loss.detach() for name, loss in weighted.items()}
    gradients = [None if view.grad is None else view.grad.split(chunk_size) for view in _row_features(whole)]

    for number, chunk in enumerate(on_device()):
        last = number == len(chunks) - 1
        with nullcontext() if last else without_reduction():
            features = encode(chunk.views, number, False)
            outputs: list[tuple[Tensor, Tensor | None]] = [
                (view, gradient[number])
                for view, gradient in zip(_row_features(features), gradients, strict=True)
                if gradient is not None and view.requires_grad  # a loss uses it, and its encoder is trained
            ]
            if last and features.scale.requires_grad:  # all rows share the temperature: its gradient counts once
                outputs.append((features.scale, whole.scale.grad))
            classified = objectives.classify(
                features, chunk.identities, chunk.views.masked_labels, rows=len(batch), picked=picked
            )
            if classified:
                outputs.append((scale_loss(total(classified)), None))
            torch.autograd.backward([output for output, _ in outputs], [gradient for _, gradient in outputs])
        for name, loss in classified.items():
            weighted[name] = weighted.get(name, 0) + loss.detach()
    return weighted


def _without_masked_captions(views: Views) -> Views:
    """Removes the masked captions, which only MLM encodes."""
    return dataclasses.replace(views, masked_token_ids=None, masked_labels=None)


def _contrastive_features(features: Features) -> Features:
    """Removes the logits, which are computed for each sample separately."""
    return dataclasses.replace(features, masked_logits=None, identity_logits=None)


def _row_features(features: Features) -> list[Tensor]:
    """Returns the features of the contrastive losses that have a row for each sample."""
    pairs = (*(features.simclr or ()), *(features.simclr_text or ()))
    views = (features.image, features.text, features.second_image, features.second_text, *pairs)
    return [view for view in views if view is not None]


def _concatenate(parts: list[Features]) -> Features:
    """Concatenates the features of all chunks, as leaves that collect gradients."""
    image, text, *others = (torch.cat(rows).requires_grad_() for rows in zip(*map(_row_features, parts), strict=True))
    soft_label_texts = [part.soft_label_texts for part in parts if part.soft_label_texts is not None]
    return Features(
        image=image,
        text=text,
        scale=parts[0].scale.detach().requires_grad_(),
        second_image=others.pop(0) if parts[0].second_image is not None else None,
        second_text=others.pop(0) if parts[0].second_text is not None else None,
        simclr=(others.pop(0), others.pop(0)) if parts[0].simclr is not None else None,
        simclr_text=(others.pop(0), others.pop(0)) if parts[0].simclr_text is not None else None,
        soft_label_texts=tuple(map(torch.cat, zip(*soft_label_texts, strict=True))) if soft_label_texts else None,
    )
