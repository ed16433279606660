"""Cost of single parts: signature scan, tables, startup. Each is the median of several rounds."""

import asyncio
import base64
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from figures import Figure, Summary
from lab.mariadb import MariaDb
from lab.system import System

from contentfilter.scanners.signatures.engine import Engine, default_loadertypes, default_signatures
from contentfilter.settings import Settings
from contentfilter.tables.keeper import read_source
from contentfilter.tables.rows import Rows
from contentfilter.tables.snapshot import Snapshot, compile_snapshot

ROUNDS = 7
ROWS = 1_000_000
LARGE = 1 << 20  # bytes; messages above it are mostly base64
AROUND = 10  # messages on each side of the median
PROGRAM = (
    b"Subject: p\nMIME-Version: 1.0\nContent-Type: application/x-msdownload\nContent-Transfer-Encoding: base64\n\n"
)


def cpu(work: Callable[[], object]) -> float:
    """Seconds of CPU."""
    began = time.process_time()
    work()
    return time.process_time() - began


def scans(corpus: Path) -> Iterator[Figure]:
    engine = Engine(default_signatures(), default_loadertypes())
    messages = sorted((path.read_bytes() for path in corpus.glob("*.eml")), key=len)
    clean = [message for message in messages if engine.scan(message) is None]
    large = [message for message in clean if len(message) >= LARGE]
    size = sum(map(len, large))
    rate = Summary.of(size / cpu(lambda: [engine.scan(one) for one in large]) / 1e9 for _ in range(ROUNDS))
    yield Figure("both signature scans, attachments above 1 MiB", 2.0, {"": rate}, at_least=True, unit="GB/s")
    program = base64.encodebytes(b"MZ\0\0" + random.Random(3).randbytes(8 << 20))
    decoded = PROGRAM + program
    assert engine.scan(decoded) is None
    rate = Summary.of(len(decoded) / cpu(lambda: engine.scan(decoded)) / 1e9 for _ in range(ROUNDS))
    yield Figure("the same, a program of 8 MiB, decoded to its end", 2.0, {"": rate}, at_least=True, unit="GB/s")
    middle = clean[len(clean) // 2 - AROUND : len(clean) // 2 + AROUND]
    again = 200
    each = [cpu(lambda: [engine.scan(one) for _ in range(again) for one in middle]) for _ in range(ROUNDS)]
    spread = Summary.of(seconds / again / len(middle) * 1e6 for seconds in each)
    yield Figure(f"both signature scans, median message ({len(middle[AROUND])} bytes)", 60, {"": spread}, unit="us")


def addresses(count: int) -> list[bytes]:
    source = random.Random(7)
    return [b"user%d@domain%d.example" % (source.randrange(count * 4), i % (count // 50 + 1)) for i in range(count)]


def look_up(count: int, directory: Path) -> float:
    """Microseconds for one look-up, half of them hits."""
    snapshot = opened(count, directory)
    known, unknown = addresses(count), [b"nobody%d@elsewhere.example" % i for i in range(2000)]
    wanted = random.Random(8).choices(known, k=2000) + unknown
    random.Random(9).shuffle(wanted)
    lookup = snapshot.lookup
    try:
        return min(cpu(lambda: [lookup(one) for one in wanted]) for _ in range(3)) / len(wanted) * 1e6
    finally:
        snapshot.close()


def opened(count: int, directory: Path) -> Snapshot:
    path = directory / f"rows-{count}"
    if not path.exists():
        compile_snapshot(Rows(clamav=dict.fromkeys(addresses(count), b"")), str(path))
    return Snapshot.open(str(path))


def private(pid: int | str = "self") -> int:
    """Private memory of this process in KiB, without file mappings that it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


_GROWTH = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
import parts
from contentfilter.tables.snapshot import Snapshot
wanted = parts.addresses(parts.ROWS)[::50]
before = parts.private()
snapshot = Snapshot.open({file!r})
for one in wanted: snapshot.lookup(one)
print((parts.private() - before) / 1024)
"""


def tables(directory: Path) -> Iterator[Figure]:
    found = Summary.of(look_up(ROWS, directory) for _ in range(ROUNDS))
    yield Figure("table look-up, a million rows", 3, {"": found}, unit="us")
    code = _GROWTH.format(path=sys.path, file=str(directory / f"rows-{ROWS}"))
    grown = [float(subprocess.check_output((sys.executable, "-c", code))) for _ in range(3)]
    yield Figure("a worker's own memory for a million rows", 5, {"": Summary.of(grown)}, unit="MiB")
    yield Figure("a million rows from text to snapshot", 3, {"": load_text(directory)}, unit="s")
    yield Figure("a million rows from MariaDB to snapshot", 8, {"": load_mariadb(directory)}, unit="s")


def load(settings: Settings, path: Path) -> float:
    """Seconds from reading the source to a snapshot on disk."""
    began = time.monotonic()
    found = asyncio.run(read_source(settings))
    assert found is not None
    compile_snapshot(found[0], str(path))
    return time.monotonic() - began


def with_parts(**sections: dict[str, object]) -> Settings:
    return msgspec.convert(sections, Settings)


def load_text(directory: Path) -> Summary:
    control = directory / "tables"
    control.mkdir()
    (control / "clamavclients").write_bytes(b"\n".join(addresses(ROWS)) + b"\n")
    settings = with_parts(service={"control": str(control)})
    return Summary.of(load(settings, directory / "loaded") for _ in range(5))


def load_mariadb(directory: Path) -> Summary:
    with MariaDb(directory / "db") as server:
        server.run("CREATE DATABASE mail", database="")
        server.run(
            "CREATE TABLE clamavclients (address VARCHAR(320) PRIMARY KEY, updated_at TIMESTAMP);"
            "SET SESSION max_recursive_iterations = 2000000;"
            "INSERT IGNORE INTO clamavclients (address) WITH RECURSIVE n (i) AS "
            f"(SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS}) "
            "SELECT CONCAT('user', i, '@domain', i % 20000, '.example') FROM n"
        )
        settings = with_parts(
            tables={"source": "mariadb"},
            mariadb={
                "socket": server.socket,
                "user": "root",
                "database": "mail",
                "spamd_table": "",
                "clamav_columns": ["address"],
            },
        )
        return Summary.of(load(settings, directory / "loaded") for _ in range(3))


def starts(directory: Path) -> Iterator[Figure]:
    def help_text() -> float:
        began = time.monotonic()
        subprocess.run((sys.executable, "-m", "contentfilter", "--help"), check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began

    help_text()
    yield Figure("contentfilter --help", 0.15, {"": Summary.of(help_text() for _ in range(9))}, unit="s")

    def serve(number: int) -> float:
        system = System(directory / f"start-{number}")
        began = time.monotonic()
        with system:
            return time.monotonic() - began

    yield Figure("serve to ready", 1.0, {"": Summary.of(serve(number) for number in range(5))}, unit="s")


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1048576
