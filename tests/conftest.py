"""Fixtures that several test files share."""

import pytest

from tests.tiny_dataset import TinyDataset, write_tiny_dataset


@pytest.fixture
def tiny_dataset(tmp_path) -> TinyDataset:
    """12 persons to train, 4 to validate and 5 to test on, two images each, in a folder that the test may change."""
    return write_tiny_dataset(tmp_path / "dataset")
