"""Whatever a mail reader opens as a program is found: a sample of what ``make fuzz`` tries."""

from collections.abc import Iterator

import pytest
from lab import programs
from lab.innocent import innocent_messages
from lab.readers import Reader, missing, readers
from lab.wrappings import wrappings

from contentfilter.errors import BackendError
from contentfilter.scanners.signatures.engine import Engine, default_loadertypes, default_signatures

MADE = programs.made()
SIGNATURES = Engine(default_signatures(), None)
LOADERS = Engine(None, default_loadertypes())
BOTH = Engine(default_signatures(), default_loadertypes())


@pytest.fixture(scope="module")
def opened() -> Iterator[dict[str, Reader]]:
    assert not missing()
    with readers() as all_of_them:
        yield all_of_them


def test_every_reader_opens_an_ordinary_attachment(opened: dict[str, Reader]) -> None:
    message = programs.mixed(programs.BASE64, programs.b64(MADE))
    assert [name for name, reader in opened.items() if MADE not in reader(message)] == []


def test_a_program_that_a_reader_opens_is_found(opened: dict[str, Reader]) -> None:
    missed = []
    for wrapping in wrappings(MADE, 2026, 300):
        for engine in (SIGNATURES, LOADERS):
            if engine.scan(wrapping.message) is None:
                who = [
                    name
                    for name, reader in opened.items()
                    if any(found.startswith(MADE[:256]) for found in reader(wrapping.message))
                ]
                missed += [(wrapping.tricks, who)] if who else []
    assert missed == []


def test_ordinary_mail_raises_no_alarm() -> None:
    alarms, count = [], 0
    for name, message in innocent_messages(seed=2026, count=200):
        count += 1
        try:
            found = BOTH.scan(message)
        except BackendError as error:
            alarms.append((name, str(error)))
        else:
            alarms += [(name, str(found))] if found else []
    assert alarms == []
    assert count == 200
