"""The snapshot follows its source; what cannot be read, or is suspiciously small, leaves the last good one in force."""

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.errors import ConfigError
from contentfilter.settings import ServiceSettings, Settings, TableSettings
from contentfilter.tables import shrink
from contentfilter.tables.keeper import Keeper
from contentfilter.tables.rows import Rows
from contentfilter.tables.snapshot import Snapshot, compile_snapshot


class Place:
    """A control directory, a state directory, and a keeper between them."""

    def __init__(self, directory: Path) -> None:
        self.control, self.state = directory / "control", directory / "state"
        self.control.mkdir()
        self.state.mkdir()
        self.settings = Settings(
            service=ServiceSettings(control=str(self.control), state=str(self.state)),
            tables=TableSettings(shrink_rows=3),
        )
        self.keeper = Keeper()

    def write(self, *keys: str) -> None:
        (self.control / "clamavclients").write_text("".join(f"{key}\n" for key in keys))

    def update(self, *, reread: bool = False) -> bool:
        return asyncio.run(self.keeper.update(self.settings, reread=reread))[0]

    def rows(self) -> set[bytes]:
        snapshot = Snapshot.open(self.keeper.path)
        return set(snapshot.rows().clamav)

    def restart(self) -> None:
        self.keeper = Keeper()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


TEN = tuple(f"u{number}@x.example" for number in range(10))


def test_the_snapshot_follows_the_source_and_only_a_change_counts(place: Place) -> None:
    assert place.keeper.path == ""
    assert not place.keeper.state().loaded
    place.write("a@x.example")
    assert place.update(reread=True)
    assert place.rows() == {b"a@x.example"}
    assert not place.update()
    assert not place.update(reread=True), "the same rows again"
    place.write("a@x.example", "b@x.example")
    assert place.update()
    state = place.keeper.state()
    assert (state.loaded, state.clamav_rows, state.spamd_rows, state.trouble) == (True, 2, 0, "")
    assert state.age < 60


def test_a_source_that_cannot_be_read_leaves_the_last_tables_and_says_since_when(place: Place) -> None:
    place.write(*TEN)
    place.update(reread=True)
    os.utime(place.keeper.path, (1000, 1000))
    (place.control / "clamavclients").unlink()
    (place.control / "clamavclients").mkdir()
    assert not place.update()
    assert "Is a directory" in place.keeper.state().trouble
    assert len(place.rows()) == 10
    place.restart()
    with pytest.raises(ConfigError):  # at a start and at a reload somebody is there to be told
        place.update(reread=True)
    assert len(place.rows()) == 10
    assert place.keeper.state().age > 1_000_000, "the age of the snapshot survives a restart"
    (place.control / "clamavclients").rmdir()
    place.write(*TEN[:9])
    assert place.update()
    assert place.keeper.state().trouble == ""
    assert place.keeper.state().age < 60


def test_a_damaged_snapshot_is_as_none(place: Place) -> None:
    place.write(*TEN)
    place.update(reread=True)
    path = Path(place.keeper.path)
    path.write_bytes(path.read_bytes()[:-1])
    place.restart()
    place.write("a@x.example")
    assert place.update(reread=True), "nothing to compare with, so nothing shrinks"
    assert place.rows() == {b"a@x.example"}


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        ((1000, 0), (499, 0), True),
        ((1000, 0), (500, 0), False),
        ((0, 1000), (0, 0), True),
        ((200, 0), (99, 0), True),
        ((100, 0), (0, 0), False),
        ((101, 0), (0, 0), True),
        ((1000, 10), (2000, 0), False),
        ((0, 0), (0, 0), False),
    ],
)
def test_what_is_suspicious(old: tuple[int, int], new: tuple[int, int], refused: bool) -> None:
    assert bool(shrink.shrunk(old, new, TableSettings())) is refused


def test_a_table_that_shrinks_waits_for_a_word_about_exactly_these_rows(place: Place) -> None:
    place.write(*TEN)
    place.update(reread=True)
    place.write("a@x.example")
    for reread in (False, False, True):
        assert not place.update(reread=reread)
        assert len(place.rows()) == 10
        trouble = place.keeper.state().trouble
        assert "clamavclients would shrink from 10 to 1 rows" in trouble
    place.restart()
    assert not place.update(reread=True), "a restart is no way around"
    shrink.accept(str(place.state), trouble.split()[-1])
    place.write("b@x.example")
    assert not place.update(reread=True), "other rows than those that were accepted"
    place.write("a@x.example")
    assert place.update(reread=True)
    assert place.rows() == {b"a@x.example"}
    assert place.keeper.state().trouble == ""
    place.write(*TEN)
    assert place.update()
    place.write("a@x.example")
    assert not place.update(), "a word counts once"


def test_a_table_that_comes_back_by_itself_needs_no_word(place: Place) -> None:
    place.write(*TEN)
    place.update(reread=True)
    place.write()
    assert not place.update()
    place.write(*TEN, "new@x.example")
    assert place.update()
    assert place.keeper.state().trouble == ""


def test_a_fault_while_a_table_is_held_back_does_not_hide_it(place: Place) -> None:
    place.write(*TEN)
    place.update(reread=True)
    place.write("a@x.example")
    place.update()
    (place.control / "me").mkdir()
    place.update()
    assert "Is a directory" in place.keeper.state().trouble
    (place.control / "me").rmdir()
    place.update()
    assert "would shrink" in place.keeper.state().trouble


KEYS = st.sampled_from([b"a@x", b"b@x", b"@x", b".x", b"*"])
TABLE = st.dictionaries(KEYS, st.sampled_from([b"", b"!", b"score=5", b"spam=mark score=2"]))


@given(clamav=TABLE, spamd=TABLE, prefs=st.frozensets(st.sampled_from([b"a@x", b"c@x", b"@x"])))
def test_rows_come_back_from_the_snapshot_and_have_one_checksum(
    tmp_path_factory: pytest.TempPathFactory,
    clamav: dict[bytes, bytes],
    spamd: dict[bytes, bytes],
    prefs: frozenset[bytes],
) -> None:
    path = str(tmp_path_factory.getbasetemp() / "back.snapshot")
    rows = Rows(clamav, spamd, b"x", (), prefs)
    compile_snapshot(rows, path)
    back = Snapshot.open(path).rows()
    assert (back.clamav, back.spamd, back.default_domain, set(back.prefs)) == (clamav, spamd, b"x", prefs)
    assert shrink.checksum(back) == shrink.checksum(rows)
    assert shrink.checksum(Rows(clamav | {b"d@x": b""}, spamd)) != shrink.checksum(rows)
    assert shrink.checksum(Rows(spamd, clamav)) == shrink.checksum(rows) or clamav != spamd
