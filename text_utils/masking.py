"""Masked language modelling (MLM): picks the tokens to predict, and masks or replaces them."""

from random import Random

from text_utils.tokenizer import END, MASK, START

IGNORED_LABEL = -100
"""Label of a token that was not picked; `torch.nn.functional.cross_entropy` ignores it by default."""

_PICKED = 0.15
_MASKED = 0.8
_REPLACED = 0.1


def mask_tokens(ids: list[int], random: Random) -> tuple[list[int], list[int]]:
    """Masks one caption, as BERT does (Devlin et al., 2019): ids without padding → (masked ids, labels), equally long.

    Each token except start and end is picked with probability 0.15. Of the picked tokens, 80 % become the mask token,
    10 % a random ordinary token, and 10 % stay. The label of a picked token is its original id, that of all others is
    `IGNORED_LABEL`. It is possible that no token is picked.
    """
    masked, labels = list(ids), [IGNORED_LABEL] * len(ids)
    for position, token in enumerate(ids):
        if token in (START, END) or random.random() >= _PICKED:
            continue
        labels[position] = token
        draw = random.random()
        if draw < _MASKED:
            masked[position] = MASK
        elif draw < _MASKED + _REPLACED:
            masked[position] = random.randrange(MASK)  # ordinary tokens come before the mask token
    return masked, labels
