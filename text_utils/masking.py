"""Masked language modelling (MLM): which tokens of a caption are hidden, and what they are to be read as."""

from random import Random

from text_utils.tokenizer import END, MASK, START

IGNORED_LABEL = -100
"""Label of a token that was not picked; `torch.nn.functional.cross_entropy` ignores it by default."""

_PICKED = 0.15
_HIDDEN = 0.8
_REPLACED = 0.1


def mask_tokens(ids: list[int], random: Random) -> tuple[list[int], list[int]]:
    """Ids of one caption, without padding -> (ids to read, labels), both as long as `ids`.

    Each token other than start and end is picked with probability 0.15. Of the picked, 80 % become the mask token, 10 %
    a random ordinary token and 10 % stay; their label is the original id, everyone else's is `IGNORED_LABEL`. It may
    be that no token is picked.
    """
    masked, labels = list(ids), [IGNORED_LABEL] * len(ids)
    for position, token in enumerate(ids):
        if token in (START, END) or random.random() >= _PICKED:
            continue
        labels[position] = token
        fate = random.random()
        if fate < _HIDDEN:
            masked[position] = MASK
        elif fate < _HIDDEN + _REPLACED:
            masked[position] = random.randrange(MASK)  # ordinary tokens come before the mask token
    return masked, labels
