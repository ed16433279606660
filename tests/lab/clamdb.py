"""Databases that a real clamd or freshclam takes for the official daily one, made in a moment and not signed.

``daily.cud`` is for clamd, which loads unsigned ones under that name and says their number in VERSION; freshclam
reads only the 512 bytes at the beginning. Format: cvd files are such a header and a tar with ``daily.info``.
"""

import hashlib
import io
import tarfile
import time
from pathlib import Path


def write(path: Path, number: int, age: float = 3600.0) -> None:
    """A database with one harmless signature, made ``age`` seconds ago, written in one step."""
    made = int(time.time() - age)
    date = time.strftime("%d %b %Y %H-%M +0000", time.gmtime(made))
    header = f"ClamAV-VDB:{date}:{number}:1:63:{'0' * 32}:x:lab:{made}".encode("ascii")
    parts = {"COPYING": b"none\n", "daily.ndb": f"Lab.Daily-1:0:*:{b'contentfilter-lab-daily'.hex()}\n".encode("ascii")}
    info = b"".join(
        f"{name}:{len(data)}:{hashlib.sha256(data).hexdigest()}\n".encode("ascii") for name, data in parts.items()
    )
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("COPYING", "daily.info", "daily.ndb"):  # the info before what it describes
            data = header + b"\n" + info if name == "daily.info" else parts[name]
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    unfinished = path.with_name("unfinished")
    unfinished.write_bytes(header.ljust(512) + body.getvalue())
    unfinished.rename(path)
