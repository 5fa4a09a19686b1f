"""A plugin of pytest for `make test-fast`: marks every test as slow whose code can start a process.

It follows the names in the code of a test and its fixtures, through the functions and classes of the tests.
"""

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import pytest

STARTERS = {"subprocess", "multiprocessing", "torch.multiprocessing", "ProcessPoolExecutor", "fork", "Popen"}
"""Modules, classes and functions that start processes. A loader's workers do not count: they are forks."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and any(map(starts_process, functions_of(item))):
            item.add_marker("slow")


def functions_of(item: pytest.Function) -> Iterator[FunctionType]:
    """The function of a test, and those of its fixtures."""
    yield item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield definitions[-1].func


_known: dict[FunctionType, bool] = {}


def starts_process(function: FunctionType) -> bool:
    """Whether the code of a function, or of what it uses from the tests, names something that starts processes."""
    function = inspect.unwrap(function)
    if function not in _known:
        _known[function] = False  # until the end: functions may call each other
        _known[function] = any(is_starter(name, function) for name in names_in(function.__code__))
    return _known[function]


def names_in(code: CodeType) -> set[str]:
    """The names in a function's code and in that of the functions in it."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def is_starter(name: str, function: FunctionType) -> bool:
    value = inspect.unwrap(function.__globals__.get(name))
    full_name = value.__name__ if isinstance(value, ModuleType) else name
    if full_name in STARTERS:
        return True
    if not str(getattr(value, "__module__", None)).startswith("tests."):
        return False
    methods = vars(value).values() if isinstance(value, type) else [value]
    return any(isinstance(method, FunctionType) and starts_process(method) for method in methods)
