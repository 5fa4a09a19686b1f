"""The oldest packages that the requirements allow are those that `make test-oldest` tests."""

import re

import pytest

from tests.helpers.runs import ROOT

ALLOWING = ("requirements.txt", "requirements-search.txt", "requirements-export.txt", "requirements-dev.txt")


def versions(text: str, sign: str) -> dict[str, str]:
    """The version of each package in a file of requirements, whose lines must be like `name>=1.2`, with this sign.

    Zeros at the end are left out, as in 2.4 for 2.4.0.
    """
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [re.fullmatch(rf"([\w-]+){sign}([\d.]+)", line) for line in lines if line and not line.startswith("-r ")]
    assert all(found), lines
    return {match[1].lower(): re.sub(r"(\.0)+$", "", match[2]) for match in found}


def test_the_oldest_packages_allowed_are_those_that_are_tested():
    allowed: dict[str, str] = {}
    for name in ALLOWING:
        allowed |= versions((ROOT / name).read_text(encoding="utf-8"), ">=")
    assert versions((ROOT / "requirements-oldest.txt").read_text(encoding="utf-8"), "==") == allowed


@pytest.mark.parametrize("text", ["torch", "torch>=2.4,<3", "torch==2.4", "torch >= 2.4", "torch~=2.4"])
def test_a_line_without_an_oldest_version_is_found(text):
    with pytest.raises(AssertionError):
        versions(text, ">=")
