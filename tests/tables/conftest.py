"""A real mariadbd with the schema and the user of etc/sql."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.mariadb import MariaDb

SQL = Path(__file__).resolve().parents[2] / "etc" / "sql"


def prepare(db: MariaDb) -> None:
    """The filter's database, as an administrator makes it."""
    db.run("CREATE DATABASE mail", database="")
    db.run((SQL / "schema.sql").read_text())
    db.run((SQL / "grants.sql").read_text())


@pytest.fixture(scope="session")
def shared_db(lab_directory: Path) -> Iterator[MariaDb]:
    with MariaDb(lab_directory / "db") as db:
        prepare(db)
        yield db


@pytest.fixture
def db(shared_db: MariaDb) -> MariaDb:
    """With empty tables. Do not stop it: take one of your own for that, with :func:`own_db`."""
    shared_db.run("DROP TABLE IF EXISTS clamavclients, spamdclients, panel")
    shared_db.run((SQL / "schema.sql").read_text())
    return shared_db


@pytest.fixture(scope="module")
def own_db(lab_directory: Path, request: pytest.FixtureRequest) -> Iterator[MariaDb]:
    """One that may be killed and started again. It has the schema, and no rows."""
    with MariaDb(lab_directory / request.module.__name__.rpartition(".")[2]) as db:
        prepare(db)
        yield db


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for sockets, and this test's own."""
    path = Path(tempfile.mkdtemp(prefix="cf-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
