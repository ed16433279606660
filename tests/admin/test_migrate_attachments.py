"""The database that replaces simscan's list of forbidden attachments does its work in a real clamd."""

import base64
import zipfile
from io import BytesIO
from pathlib import Path

import clamd as oracle
import pytest
from lab.clamd import Clamd

from contentfilter.admin.migrate_simscan import migrate

MESSAGE = b"""From: a@example.com
To: b@example.com
Subject: see attachment
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="x"

--x
Content-Type: text/plain

Hello
--x
Content-Type: application/octet-stream; name="%(name)s"
Content-Disposition: attachment; filename="%(name)s"
Content-Transfer-Encoding: base64

%(body)s
--x--
"""


@pytest.fixture(scope="module")
def scan(lab_directory: Path) -> object:
    """Ask a clamd that has the written database."""
    endings = b".exe:.tar.gz:winmail.dat:.v+b:.a$b"
    done = migrate({"simcontrol": b":clam=yes,attach=%b\na.example:attach=%b:.mp3\n" % (endings, endings)})
    directory = lab_directory / "attachments"
    (directory / "database").mkdir(parents=True)
    for file in done.files:
        if file.path.startswith("clamd/"):
            (directory / "database" / Path(file.path).name).write_bytes(file.content)
    with Clamd(directory) as daemon:
        client = oracle.ClamdUnixSocket(daemon.socket)

        def ask(name: bytes, body: bytes = b"nothing special here " * 9) -> str:
            message = MESSAGE % {b"name": name, b"body": base64.encodebytes(body)}
            status, signature = client.instream(BytesIO(message))["stream"]
            return signature or status

        yield ask


@pytest.mark.parametrize(
    "name", [b"setup.exe", b"SETUP.EXE", b"a.b.tar.gz", b"winmail.dat", b"my-winmail.dat", b"x.v+b"]
)
def test_a_forbidden_ending_is_found(scan, name: bytes) -> None:  # type: ignore[no-untyped-def]
    assert scan(name).startswith("ContentFilter.Attachment.")


@pytest.mark.parametrize(
    "name", [b"exe", b"exe.txt", b"setup.exe.txt", b"song.mp3", b"atar.gz", b"x.vb", b"x.vvb", b"xexe"]
)
def test_other_names_pass(scan, name: bytes) -> None:  # type: ignore[no-untyped-def]
    assert scan(name) == "OK"


def test_names_inside_an_archive_are_not_meant(scan) -> None:  # type: ignore[no-untyped-def]
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("setup.exe", "harmless")
    assert scan(b"files.zip", packed.getvalue()) == "OK"
