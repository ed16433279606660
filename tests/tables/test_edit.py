"""Changes to a table file: exact, atomic, and never one over another."""

import asyncio
import fcntl
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentfilter.deadline import Deadline
from contentfilter.errors import ConfigError
from contentfilter.tables import edit as edit_module
from contentfilter.tables.edit import LOCK, Edit, change_table, edited, locked
from contentfilter.tables.rows import parse_table

TEXT = b"""# our clients

A@x.example   # the first
!b@x.example
bad line here
x.example
"""


def test_a_new_row_goes_to_the_end_and_everything_else_stays():
    assert edited(TEXT, {b"c@x.example": b""}) == (TEXT + b"c@x.example\n", Edit(added=1))
    assert edited(TEXT, {b"c@x.example": b"!"}) == (TEXT + b"!c@x.example\n", Edit(added=1))


def test_a_row_that_is_there_as_wanted_stays_as_it_is_written():
    assert edited(TEXT, {b"a@x.example": b"", b"b@x.example": b"!", b"@x.example": b""}) == (TEXT, Edit(same=3))


def test_a_row_with_the_other_meaning_is_changed_in_its_place():
    text, edit = edited(TEXT, {b"b@x.example": b"", b"@x.example": b"!"})
    assert text == TEXT.replace(b"!b@x", b"b@x").replace(b"\nx.example", b"\n!@x.example")
    assert edit == Edit(changed=2)


def test_adding_a_row_that_has_options_of_its_own_leaves_them():
    text = b"a@x.example score=5\n"
    assert edited(text, {b"a@x.example": b""}) == (text, Edit(same=1))
    assert edited(text, {b"a@x.example": b"!"}) == (b"!a@x.example\n", Edit(changed=1))
    assert edited(text, {b"a@x.example": b""}, only=True) == (b"a@x.example\n", Edit(changed=1))


def test_removing_takes_the_rows_and_leaves_the_comments():
    text, edit = edited(TEXT, {}, {b"a@x.example", b"@x.example", b"nobody@x.example"})
    assert text == b"# our clients\n\n!b@x.example\nbad line here\n"
    assert edit == Edit(removed=2)


def test_replacing_leaves_comments_and_the_wanted_rows():
    text, edit = edited(TEXT, {b"a@x.example": b"", b"z@x.example": b""}, only=True)
    assert text == b"# our clients\n\nA@x.example   # the first\nbad line here\nz@x.example\n"
    assert edit == Edit(added=1, removed=2, same=1)


def test_a_repeated_row_that_would_count_does_not_survive():
    text, edit = edited(b"a@x.example\n!a@x.example\n", {b"a@x.example": b""})
    assert text == b"a@x.example\n"
    assert edit.differs


def test_a_last_line_without_end_is_not_glued_to_the_new_one():
    assert edited(b"a@x.example", {b"b@x.example": b""})[0] == b"a@x.example\nb@x.example\n"
    assert edited(b"", {b"b@x.example": b""})[0] == b"b@x.example\n"


KEYS = st.sampled_from([b"a@x.example", b"b@x.example", b"@x.example", b".x.example", b"*"])
VALUES = st.sampled_from([b"", b"!"])
LINES = st.lists(
    st.one_of(st.builds(lambda k, v: v + k, KEYS, VALUES), st.sampled_from([b"# c", b"", b"X.example", b"bad line"]))
)


@settings(max_examples=300, deadline=None)
@given(LINES, st.dictionaries(KEYS, VALUES), st.sets(KEYS), st.booleans())
def test_afterwards_the_table_is_what_was_asked_for(lines, put, drop, only):
    text = b"\n".join(lines)
    before = parse_table(text, "x")[0]
    changed, edit = edited(text, put, drop, only=only)
    kept = {} if only else {key: value for key, value in before.items() if key not in drop}
    assert parse_table(changed, "x")[0] == kept | put
    assert [line for line in changed.split(b"\n") if line in (b"# c", b"bad line")] == [
        line for line in lines if line in (b"# c", b"bad line")
    ]
    if not edit.differs:
        assert changed == text + (b"" if text.endswith(b"\n") or not text else b"\n")


def change(path, *args, **kwargs):
    return asyncio.run(change_table(str(path), *args, **kwargs))


def test_mode_owner_and_link_stay(tmp_path):
    real = tmp_path / "real"
    real.write_bytes(TEXT)
    real.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(real, 12, 34)
    owner = real.stat()
    link = tmp_path / "clamavclients"
    link.symlink_to("real")
    assert change(link, {b"c@x.example": b""}) == Edit(added=1)
    assert link.is_symlink()
    assert real.read_bytes() == TEXT + b"c@x.example\n"
    now = real.stat()
    assert (now.st_mode, now.st_uid, now.st_gid) == (owner.st_mode, owner.st_uid, owner.st_gid)
    assert sorted(os.listdir(tmp_path)) == ["clamavclients", "real"]


def test_without_a_difference_the_file_is_not_touched(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(TEXT)
    before = path.stat()
    assert not change(path, {b"a@x.example": b""}).differs
    assert change(path, {b"new@x.example": b""}, write=False) == Edit(added=1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert path.read_bytes() == TEXT


def test_a_change_by_somebody_else_in_between_is_not_lost(tmp_path, monkeypatch):
    path = tmp_path / "t"
    path.write_bytes(TEXT)
    theirs = [b"theirs1@x.example\n", b"theirs2@x.example\n"]
    real = edit_module.edited

    def meanwhile(*args, **kwargs):
        if theirs:
            path.write_bytes(path.read_bytes() + theirs.pop(0))
        return real(*args, **kwargs)

    monkeypatch.setattr(edit_module, "edited", meanwhile)
    change(path, {b"ours@x.example": b""})
    assert path.read_bytes() == TEXT + b"theirs1@x.example\ntheirs2@x.example\nours@x.example\n"


def test_the_lock_has_a_deadline(tmp_path):
    async def wait():
        async with locked(str(tmp_path), Deadline.after(0.05)):
            raise AssertionError("the lock is held by somebody else")

    with open(tmp_path / LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="somebody else is changing"):
            asyncio.run(wait())


ADDER = """
import asyncio, sys
from contentfilter.deadline import Deadline
from contentfilter.tables.edit import change_table, locked

async def main(control, name, count):
    for number in range(count):
        async with locked(control, Deadline.after(60)):
            await change_table(control + "/clamavclients", {b"%s%d@x.example" % (name.encode(), number): b""})

sys.stdin.readline()
asyncio.run(main(sys.argv[1], sys.argv[2], 40))
"""


def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path):
    adders = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(tmp_path), name], stdin=subprocess.PIPE, text=True)
        for name in ("one", "two", "three")
    ]
    for adder in adders:
        adder.stdin.write("go\n")
        adder.stdin.flush()
    for adder in adders:
        adder.communicate(timeout=100)
        assert adder.returncode == 0
    table, problems = parse_table((tmp_path / "clamavclients").read_bytes(), "x")
    assert table == {b"%s%d@x.example" % (name, n): b"" for name in (b"one", b"two", b"three") for n in range(40)}
    assert problems == ()
