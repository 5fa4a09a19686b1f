"""Seeds and thread counts that make each sample and step reproducible from its position in the run, bit for bit."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*key: int | str) -> int:
    """Returns a 63-bit seed that depends on all parts of the key: (1, 0) and (0, 1) give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def single_threaded() -> Iterator[None]:
    """Makes torch compute in one thread, as in loader workers. With more threads, sums are rounded differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seeds torch's default CPU generator with the key, and restores its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
