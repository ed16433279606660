"""The figures of SECURITY.md and docs/limits.md are those of the code, and the unit has room for them."""

import re

import pytest
from install.test_units import SERVICE, value
from style.tree import ROOT

from contentfilter.doors import listener, message, private_copy
from contentfilter.doors.handover import MAX_PENDING
from contentfilter.model import RECIPIENTS_MAX
from contentfilter.receiver import child
from contentfilter.receiver.limits import ReceiverLimits
from contentfilter.settings import Settings
from contentfilter.wire import clamd

MIB = 1024 * 1024
SETTINGS, USER = Settings().service, ReceiverLimits()
WAIT = child.REQUEST_WAIT + child.COPY_WAIT
DESCRIPTORS = 8 * SETTINGS.max_in_flight + 3 * SETTINGS.max_waiting + listener.SPARE + MAX_PENDING  # of a worker

SECURITY = (
    f"{RECIPIENTS_MAX:,} recipients, then rejected; an envelope of {message.ENVELOPE_LIMIT // MIB} MiB, then deferred",
    f"a message of {SETTINGS.max_message // MIB} MiB (`max_message`), then deferred",
    f"deferred after {SETTINGS.admission_wait:.0f} seconds",
    f"{USER.connections} connections, {USER.bytes // MIB} MiB and {USER.rate:.0f} new connections per second for each",
    f"{USER.all_connections} connections and {USER.all_bytes // MIB} MiB for all of them",
    f"copying: {WAIT:.0f} seconds and {child.COPY_CPU} seconds of CPU, then the child is killed",
    f"{SETTINGS.max_in_flight} messages at a time and {SETTINGS.max_in_flight_bytes // MIB} MiB in each",
    f"{SETTINGS.max_waiting} wait",
    f"sealed up to {private_copy.IN_MEMORY // MIB} MiB",
    f"an answer of {clamd.ANSWER_LIMIT // 1024} KiB",
)
LIMITS = (
    f"{SETTINGS.max_in_flight_bytes // MIB} MiB of charges (`max_in_flight_bytes`)",
    f"for {SETTINGS.max_in_flight} small messages (`max_in_flight`)",
    f"1, and {USER.all_connections} children | 64 MiB, {USER.all_bytes // MIB} MiB of copies",
    f"`memory_floor` ({SETTINGS.memory_floor // MIB} MiB)",
    f"above {private_copy.IN_MEMORY // MIB} MiB a copy of it is a file",
    f"({SETTINGS.max_waiting}, `max_waiting`), and {listener.SPARE + MAX_PENDING}: {DESCRIPTORS}.",
    f"| `MemoryMax` | {value(SERVICE, 'MemoryMax')} |",
    f"| `TasksMax` | {value(SERVICE, 'TasksMax')} |",
    f"| `LimitNOFILE` | {value(SERVICE, 'LimitNOFILE')} |",
)


@pytest.mark.parametrize(
    ("page", "figure"),
    [*(("SECURITY.md", each) for each in SECURITY), *(("docs/limits.md", each) for each in LIMITS)],
)
def test_the_page_has_the_figure_of_the_code(page: str, figure: str) -> None:
    assert figure in (ROOT / page).read_text()


def test_the_unit_has_room_for_what_the_page_adds_up() -> None:
    assert int(value(SERVICE, "LimitNOFILE")) // 8 >= DESCRIPTORS, "settings may be raised"
    threads = re.search(r"enough for (\d+) workers", (ROOT / "docs/limits.md").read_text())
    assert threads is not None
    assert int(threads[1]) * 64 + USER.all_connections + 1 + 32 <= int(value(SERVICE, "TasksMax"))
    assert value(SERVICE, "OOMPolicy") == "continue"
