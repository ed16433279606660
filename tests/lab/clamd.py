"""A real clamd with a few signatures of its own: up in a tenth of a second, on a Unix socket and on TCP.

The signatures match test strings that are put together when the daemon starts, so that no virus
scanner stops at these files. Each one represents a class of findings.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from lab.process import ScannerDaemon, ask, find_program, user_who_reaches

EICAR = b"".join((b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$", b"EICAR", b"-STANDARD-ANTIVIRUS-TEST-FILE!", b"$H+H*"))
PUA = b"contentfilter-lab-" + b"unwanted-program"
PHISHING = b"contentfilter-lab-" + b"phishing-page"

# clamd adds .UNOFFICIAL to every name from a database that is not signed.
SIGNATURES = {"Eicar-Test-Signature": EICAR, "PUA.Lab.Tool": PUA, "Lab.Phishing.Page-1": PHISHING}
SIGNATURE_FILE = {"lab.ndb": "".join(f"{name}:0:*:{text.hex()}\n" for name, text in SIGNATURES.items())}
EICAR_NAME = "Eicar-Test-Signature.UNOFFICIAL"


class Clamd(ScannerDaemon):
    """``with Clamd(directory) as clamd:`` then ``clamd.socket``, ``clamd.tcp``, ``clamd.pid``.

    ``extra``: lines for clamd.conf, e.g. ``StreamMaxLength 1M``. ``database``: files with their lines, in place of
    the lab's. ``directory`` is made where it is missing; its path must be short enough for a Unix socket. As root it
    runs as clamav where the directory lets it.
    """

    def __init__(self, directory: Path, *extra: str, database: Mapping[str, str] | None = None) -> None:
        super().__init__(directory)
        self._extra = extra
        self._database = SIGNATURE_FILE if database is None else database

    def start(self) -> Self:
        program = find_program("clamd", "clamav-daemon")
        database = self.directory / "database"
        database.mkdir(parents=True, exist_ok=True)
        for name, lines in self._database.items():
            (database / name).write_text(lines)
        temporary = self.directory / "tmp"
        temporary.mkdir(exist_ok=True)
        config = [
            f"DatabaseDirectory {database}",
            f"TemporaryDirectory {temporary}",
            f"LocalSocket {self.socket}",
            "LocalSocketMode 666",
            f"TCPSocket {self.tcp[1]}",
            f"TCPAddr {self.tcp[0]}",
            "Foreground yes",
            "OfficialDatabaseOnly no",
            "DetectPUA yes",
            *self._extra,
        ]
        user = user_who_reaches(self.directory, "clamav")
        if user is not None:
            config.append(f"User {user}")
            for path in (self.directory, temporary):
                shutil.chown(path, user)
        (self.directory / "clamd.conf").write_text("\n".join((*config, "")))
        command = [program, "--foreground", f"--config-file={self.directory / 'clamd.conf'}"]
        self.launch(command, lambda: ask(self.socket, b"zPING\0") == b"PONG\0" == ask(self.tcp, b"zPING\0"))
        return self
