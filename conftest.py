"""Skips a doctest whose library is absent or not asked for; fails where it was required."""

import re

import pytest

import backends


def pytest_runtest_setup(item):  # noqa: D103, a hook
    if isinstance(item, pytest.DoctestItem):
        source = "".join(example.source for example in item.dtest.examples)
        for module in re.findall(r"^import (\w+)", source, re.MULTILINE):
            if module in backends.BY_BACKEND and module != "numpy":
                backends.needs(module)
