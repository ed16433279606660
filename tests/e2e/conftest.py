"""One running system with everything switched on, and ways to start others."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lab.clamd import Clamd
from lab.spamd import Spamd
from lab.system import System

CONTROLS = {
    "options": "chksignature 1\nchkloadertype 1\nsamsgsize 200000\n",
    "clamavclients": "@protected.example\nvirus-only@mixed.example\n!exempt@protected.example\n",
    "spamdclients": "@protected.example\nspam-only@mixed.example\n",
}

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def system(lab_directory: Path, clamd: Clamd, spamd: Spamd) -> Iterator[System]:
    """Shared: do not kill its parts or change its configuration."""
    settings = {"spamd": {"subject_tag": "[SPAM] "}}
    with System(lab_directory / "main", controls=CONTROLS, settings=settings, clamd=clamd, spamd=spamd) as system:
        yield system


@pytest.fixture
def make_system(lab_directory: Path) -> Iterator[Callable[..., System]]:
    """``make_system(controls=…, settings=…, clamd=…)``: a running system of this test's own, with one worker."""
    with ExitStack() as stack:

        def make(**options: Any) -> System:
            options = {"controls": CONTROLS} | options
            settings = dict(options.get("settings", {}))
            options["settings"] = settings | {"service": {"workers": 1} | settings.get("service", {})}
            return stack.enter_context(System(lab_directory / f"s{next(_numbers)}", **options))

        yield make
