"""Seeds that say what they are for, so that every random draw of a run depends on its place in the run alone."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on all parts of the key: (1, 0) and (0, 1) give unrelated ones."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Within it, torch's default CPU generator is seeded by the key; afterwards it goes on as before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
