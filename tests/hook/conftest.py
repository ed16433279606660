"""The hook, its sanitized twin, and a laboratory around them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import hook, standin


def shared(factory: pytest.TempPathFactory) -> Path:
    """One directory for all workers of a run: each program is compiled about once."""
    base = factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def hook_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hook.build(shared(tmp_path_factory))


@pytest.fixture(scope="session")
def sanitized_hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hook.build(shared(tmp_path_factory), "sanitize")


@pytest.fixture(scope="session")
def impatient_hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Waits 0.3 s for split submissions where the real one waits 30, and 1 s for its input instead of a day."""
    return hook.build(shared(tmp_path_factory), "impatient")


@pytest.fixture(scope="session")
def standin_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.build(shared(tmp_path_factory))


def _lab(directory: Path, program: Path, standin_program: Path) -> Iterator[hook.HookLab]:
    lab = hook.HookLab(directory, program, standin.Standin(standin_program, directory / "queued"))
    yield lab
    lab.close()


@pytest.fixture
def lab(tmp_path: Path, hook_program: Path, standin_program: Path) -> Iterator[hook.HookLab]:
    yield from _lab(tmp_path, hook_program, standin_program)


@pytest.fixture(params=["static", "sanitized"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path, hook_program: Path, standin_program: Path
) -> Iterator[hook.HookLab]:
    """The laboratory twice: with the hook that users get, and with address and undefined-behaviour checks."""
    sanitized = request.param == "sanitized"
    program = request.getfixturevalue("sanitized_hook") if sanitized else hook_program
    yield from _lab(tmp_path, program, standin_program)
