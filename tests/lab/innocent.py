"""Ordinary mail: files of this system, documents, archives and random data, attached as mail programs attach them."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import random
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import SMTP
from functools import cache
from pathlib import Path

from lab.programs import BASE64, BINARY, FORWARD, QUOTED, b64, mixed, qp

ROOTS = ("/usr/share/doc", "/usr/share/perl", "/usr/share/icons", "/usr/lib", "/usr/bin", "/etc", sys.prefix)
LARGEST = 100_000  # bytes
MOST = 30_000  # files of one root


@cache
def files() -> tuple[Path, ...]:
    """Readable files of this system that are no Windows programs."""
    found = []
    for root in ROOTS:
        names = (Path(where, name) for where, _, names in os.walk(root) for name in sorted(names))
        plain = (path for path in names if path.suffix not in (".exe", ".dll", ".efi") and path.is_file())
        found += itertools.islice(plain, MOST)
    return tuple(found)


def content(rng: random.Random) -> tuple[str, bytes]:
    """A name and the bytes of one attachment."""
    if rng.random() < 0.1:
        return "random data", rng.randbytes(rng.randrange(100, 50_000))
    while True:
        path = rng.choice(files())
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST)
        except OSError:
            continue
        if not data.startswith(b"MZ"):
            break
    pack = rng.random()
    if pack < 0.05:
        return f"{path}, gzip", gzip.compress(data)
    if pack < 0.1:
        return f"{path}, bzip2", bz2.compress(data)
    if pack < 0.12:
        return f"{path}, xz", lzma.compress(data)
    out = io.BytesIO()
    if pack < 0.2:
        with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            archive.writestr(path.name, data)
        return f"{path}, zip", out.getvalue()
    if pack < 0.25:
        with tarfile.open(fileobj=out, mode="w") as tar:
            member = tarfile.TarInfo(path.name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        return f"{path}, tar", out.getvalue()
    return str(path), data


def message(rng: random.Random) -> tuple[str, bytes]:
    """One message with one or a few attachments."""
    name, data = content(rng)
    how = rng.choice(("base64", "quoted-printable", "8bit", "text", "forward", "library", "library"))
    if how == "base64":
        return name, mixed(BASE64, b64(data, rng.choice((60, 76))))
    if how == "quoted-printable":
        return name, mixed(QUOTED, qp(data[:50_000]))
    if how == "8bit":
        return name, mixed(BINARY, data)
    if how == "text":
        return name, b"From: a@example.org\nSubject: s\n\n" + data
    if how == "forward":
        return name, mixed(FORWARD, mixed(BASE64, b64(data)), boundary=b"O", declared=b"boundary=O")
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "a@example.org", "b@example.org", "files"
    mail.set_content("See the attachments.\n-- \nme\n")
    mail.add_attachment(data, maintype="application", subtype="octet-stream", filename="a.bin")
    if rng.random() < 0.5:
        other, more = content(rng)
        mail.add_attachment(more, maintype="application", subtype="octet-stream", filename="b.bin")
        name = f"{name} and {other}"
    return name, mail.as_bytes(policy=rng.choice((SMTP, SMTP.clone(linesep="\n"))))


def innocent_messages(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` messages and what is in them, the same for the same seed and system."""
    for number in range(count):
        yield message(random.Random(f"{seed}.{number}"))
