"""The snapshot: the same answers as a plain model of the rules, and nothing but a clear error for a bad file."""

import json
import os
import struct
import subprocess
import sys
import time
import zlib

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from contentfilter.errors import ConfigError
from contentfilter.files import SourceState
from contentfilter.policy.plan import Row
from contentfilter.tables.rows import Rows, parse_table
from contentfilter.tables.snapshot import Snapshot, compile_snapshot

# Few words, so that tables and recipients meet often.
LABELS = st.sampled_from([b"a", b"b", b"com", b"Mail"])
DOMAINS = st.lists(LABELS, min_size=1, max_size=4).map(b".".join)
LOCALS = st.lists(st.sampled_from([b"u", b"v", b"", b"X"]), min_size=1, max_size=4).map(b"-".join)
ADDRESSES = st.builds(lambda local, domain: local + b"@" + domain, LOCALS, DOMAINS)
KEYS = st.one_of(
    ADDRESSES.filter(lambda a: not a.startswith(b"@")),
    DOMAINS.map(b"@".__add__),
    DOMAINS.map(b".".__add__),
    st.just(b"*"),
).map(bytes.lower)
VALUES = st.sampled_from([b"", b"!", b"score=5", b"a=1 b=2"])
TABLES = st.dictionaries(KEYS, VALUES, max_size=12)
RECIPIENTS = st.one_of(
    ADDRESSES, LOCALS, st.binary(max_size=12), st.builds(bytes.__add__, ADDRESSES, st.binary(max_size=3))
)


def model(table, recipient, extension, domain):
    """The rules of design 6, as plainly as they can be said."""
    local, at, host = recipient.lower().rpartition(b"@")
    if not at:
        local, host = recipient.lower(), domain.lower()
    keys = []
    if host:
        parts = local.split(extension) if extension else [local]
        for count in range(len(parts), 0, -1):
            shorter = extension.join(parts[:count])
            if shorter or count == len(parts):
                keys.append(shorter + b"@" + host)
        keys.append(b"@" + host)
        labels = host.split(b".")
        keys += [b"." + b".".join(labels[count:]) for count in range(1, len(labels))]
    keys.append(b"*")
    for key in keys:
        if key in table:
            value = table[key]
            return Row(key, value == b"!", b"" if value == b"!" else value)
    return None


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    TABLES,
    TABLES,
    st.lists(RECIPIENTS, min_size=1, max_size=8),
    st.sampled_from([b"", b"-"]),
    st.sampled_from([b"", b"a.com"]),
)
@example({b"u@a": b""}, {}, [b"U-@a", b"u@a\n", b"\nu@a", b"u@a\0A"], b"-", b"")
@example({b"@a": b"x=1"}, {b"@a": b"!"}, [b"u@a", b"u@a\0[x=1"], b"", b"")
def test_every_recipient_gets_the_answer_of_the_plain_rules(tmp_path, clamav, spamd, recipients, extension, domain):
    path = str(tmp_path / "snapshot")
    compile_snapshot(Rows(clamav, spamd, domain), path)
    snapshot = Snapshot.open(path, extension)
    for recipient in recipients:
        expected = model(clamav, recipient, extension, domain), model(spamd, recipient, extension, domain)
        assert snapshot.lookup(recipient) == expected
    snapshot.close()


def rows(count=50):
    clamav, _ = parse_table(b"".join(b"user%d@d%d.example\n" % (i, i % 7) for i in range(count)), "x")
    return Rows(
        clamav, {b"@d1.example": b"", b".example": b"!", b"*": b""}, b"me.example", (SourceState("x", 1, 2, 3),)
    )


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "snapshot")
    compile_snapshot(rows(), path, created=1.0)
    return path


def test_the_header_says_what_is_in_it_and_where_it_comes_from(path):
    header = Snapshot.open(path).header
    assert (header.clamav_rows, header.spamd_rows) == (50, 3)
    assert header.sources == (SourceState("x", 1, 2, 3),)
    assert header.created == 1.0


def test_equal_rows_give_an_equal_file(path, tmp_path):
    other = str(tmp_path / "other")
    compile_snapshot(rows(), other, created=1.0)
    assert read(other) == read(path)
    later = compile_snapshot(rows(), other, created=2.0)
    assert later.checksum == Snapshot.open(path).header.checksum


def test_empty_tables_are_a_snapshot_too(tmp_path):
    path = str(tmp_path / "empty")
    compile_snapshot(Rows(), path)
    assert Snapshot.open(path).lookup(b"u@d.example") == (None, None)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def refused(path):
    with pytest.raises(ConfigError) as caught:
        Snapshot.open(path)
    (problem,) = caught.value.problems
    assert problem.path == path
    return problem.text


def test_a_bit_that_flips_anywhere_is_noticed(path):
    good = read(path)
    for at in range(len(good)):
        write(path, good[:at] + bytes((good[at] ^ 0x10,)) + good[at + 1 :])
        assert "not a usable table snapshot" in refused(path), at


def test_a_file_cut_off_anywhere_or_too_long_is_refused(path):
    good = read(path)
    for size in range(len(good)):
        write(path, good[:size])
        assert "not a usable table snapshot" in refused(path), size
    write(path, good + b"\0")
    refused(path)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 4096, b"user@example.com\n" * 10, b"CFTABLE2" + b"\0" * 100, bytes(range(256)) * 20]
)
def test_a_foreign_file_is_refused(path, data):
    write(path, data)
    assert "does not start with" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": 3},
        {"buckets": 0},
        {"buckets": -4},
        {"buckets": 1 << 40},
        {"size": 1 << 60},
        {"parent_labels": "x"},
        None,
    ],
)
def test_a_header_that_lies_with_a_right_checksum_is_refused(path, change):
    good = read(path)
    length = struct.unpack_from("<I", good, 8)[0]
    head = json.loads(good[16 : 16 + length])
    head = json.dumps(head | change).encode() if change is not None else b"[" * 1000
    write(path, struct.pack("<8sII", b"CFTABLE1", len(head), zlib.crc32(head)) + head + good[16 + length :])
    assert "not a usable table snapshot" in refused(path)


def test_a_header_of_four_gigabytes_is_not_read(path):
    write(path, struct.pack("<8sII", b"CFTABLE1", 0xFFFFFFFF, 0) + b"x" * 1000)
    assert "header is damaged" in refused(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(str(tmp_path / "fifo"))
    assert "not a regular file" in refused(str(tmp_path))
    assert "No such file" in refused(str(tmp_path / "missing"))


def test_an_open_snapshot_outlives_its_replacement(path):
    old = Snapshot.open(path)
    compile_snapshot(Rows({b"*": b"!"}), path)
    assert old.lookup(b"user1@d1.example")[0] == Row(b"user1@d1.example", exempt=False)
    assert Snapshot.open(path).lookup(b"user1@d1.example")[0] == Row(b"*", exempt=True)
    assert os.listdir(os.path.dirname(path)) == ["snapshot"], "no temporary file is left"


def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(path, monkeypatch):
    good = read(path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        compile_snapshot(Rows(), path)
    assert read(path) == good
    assert os.listdir(os.path.dirname(path)) == ["snapshot"]


def test_a_closed_snapshot_raises_and_does_not_crash(path):
    snapshot = Snapshot.open(path)
    snapshot.close()
    snapshot.close()
    with pytest.raises(ValueError):
        snapshot.lookup(b"user1@d1.example")


def test_opening_leaves_no_descriptor(path):
    before = os.listdir("/proc/self/fd")
    snapshots = [Snapshot.open(path) for _ in range(5)]
    write(path, b"bad")
    refused(path)
    for snapshot in snapshots:
        snapshot.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


MILLION = 1_000_000
WORKER = """
import random, sys, time
from contentfilter.tables.snapshot import Snapshot

def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))

snapshot_path = sys.argv[1]
random.seed(1)
wanted = [b"user%d@d%d.example.com" % (i, i % 20000) for i in random.sample(range(1_000_000), 20_000)]
absent = [b"x" + address + b".a.b.c.d" for address in wanted]
before = private()
snapshot = Snapshot.open(snapshot_path)
assert all(snapshot.lookup(address)[0].key == address for address in wanted)
assert not any(snapshot.lookup(address)[0] for address in absent)
grown = private() - before
def microseconds(addresses):
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for address in addresses:
            snapshot.lookup(address)
        rounds.append(time.process_time() - start)
    return min(rounds) / len(addresses) * 1e6
print(grown, microseconds(wanted), microseconds(absent), flush=True)
sys.stdin.readline()
"""


@pytest.mark.timeout(300)
def test_a_million_rows_load_in_seconds_and_cost_their_memory_once(tmp_path, record_property):
    text = b"".join(b"user%d@d%d.example.com\n" % (i, i % 20_000) for i in range(MILLION))
    path = str(tmp_path / "million")
    start = time.process_time()
    table, problems = parse_table(text, "x")
    header = compile_snapshot(Rows(table), path)
    built = time.process_time() - start
    assert problems == ()
    assert header.clamav_rows == MILLION
    del table, text
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    measured = []
    for worker in workers:
        line = worker.stdout.readline()
        assert line, "the worker failed"
        measured.append([float(word) for word in line.split()])
    for worker in workers:
        worker.communicate("\n")
        assert worker.returncode == 0
    # The second to finish maps what the first has mapped too: nothing of it is private.
    grown, hit, miss = map(min, zip(*measured, strict=True))
    size = os.path.getsize(path) >> 10
    figures = f"build {built:.2f} s CPU, hit {hit:.2f} us, miss {miss:.2f} us, private {grown:.0f} KiB of {size}"
    record_property("figures", figures)
    print(figures)
    assert grown < 5 << 10
    assert built < 15  # generous: the target is 3 s on an idle machine
    assert hit < 30
    assert miss < 30
