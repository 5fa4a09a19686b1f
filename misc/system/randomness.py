"""What makes a sample and a step depend on their place in the run alone, to the last bit."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on all parts of the key: (1, 0) and (0, 1) give unrelated ones."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within it torch computes in one thread, as it does in loader workers: with more, sums round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Within it, torch's default CPU generator is seeded by the key; afterwards it goes on as before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
