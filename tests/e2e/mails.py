"""Messages for the tests of the whole system."""

import base64
from pathlib import Path

from lab.clamd import EICAR
from lab.spamd import GTUBE

PLAIN = b"From: a@example.net\nTo: user@protected.example\nSubject: hello\n\nJust a letter.\n"
VIRUS = b"From: a@example.net\nSubject: look\n\n" + EICAR + b"\n"
SPAM = (
    b"From: a@example.net\nTo: b@example.org\nSubject: offer\nDate: Mon, 1 Jan 2024 00:00:00 +0000\n"
    b"Message-ID: <1@example.net>\n\n" + GTUBE + b"\n"
)
ODD = b"Subject: odd\n\nNUL \0 bare \r CR, 8-bit \xff\xfe, long " + b"x" * 5000 + b" no newline at the end"


def program() -> bytes:
    """A real Windows program: the launcher that pip installs scripts with."""
    import pip._vendor.distlib as distlib

    return (Path(distlib.__file__).parent / "t64.exe").read_bytes()


def with_program() -> bytes:
    """A message that carries it in base64, named as something else."""
    return (
        b"From: a@example.net\nSubject: invoice\nMIME-Version: 1.0\n"
        b'Content-Type: multipart/mixed; boundary="b"\n\n--b\nContent-Type: text/plain\n\nsee attached\n--b\n'
        b'Content-Type: application/pdf; name="invoice.pdf"\nContent-Transfer-Encoding: base64\n\n'
        + base64.encodebytes(program())
        + b"--b--\n"
    )
