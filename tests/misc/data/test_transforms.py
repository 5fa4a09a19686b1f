"""A torchvision that was compiled for another torch."""

import importlib.abc
import os
import runpy
import sys

import pytest
import torch

from tests.helpers.elsewhere import PROJECT
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_server
from tests.helpers.runs import Outcome, only_error


class Unfitting(importlib.abc.MetaPathFinder):
    """Fails as torchvision does when it registers its operators."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")


def start_with_unfitting_torchvision(*words: str) -> None:
    """Starts a command in a forked process, as a new interpreter would."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*PROJECT, "torchvision"):
            del sys.modules[name]
    sys.meta_path.insert(0, Unfitting())
    sys.argv = list(words)
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("words", [("main.py",), ("search.py", "query", "people", "a woman")], ids=["main", "search"])
def test_a_torchvision_of_another_torch_is_one_clear_line(words):
    ended = fork_server()([Call(start_with_unfitting_torchvision, words, dict(os.environ), ROOT)])
    line = only_error(Outcome(ended.statuses[0], ended.out, ended.err))
    assert torch.__version__ in line and "torchvision::nms" in line
    assert f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*" in line
