"""A real mariadbd with a data directory of its own: on a Unix socket, and on TCP where wanted.

Nothing waits for the disk, so it is there in a few seconds; the tables are gone with the directory.
"""

import getpass
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Self

from lab.process import Daemon, find_program, free_port, user_who_reaches

PACKAGE = "mariadb-server"
DATABASE = "mail"

_FAST = (
    "--no-defaults",
    "--skip-name-resolve",
    "--innodb-flush-log-at-trx-commit=2",  # survives a kill, not a power cut
    "--innodb-doublewrite=0",
    "--innodb-buffer-pool-size=128M",
    "--innodb-log-file-size=64M",
    "--skip-log-bin",
    "--max-connections=20",
)


class MariaDb(Daemon):
    """``with MariaDb(directory) as db:`` then ``db.socket``, ``db.port``, ``db.run("SQL")``.

    ``extra``: options for mariadbd, e.g. ``--ssl-cert=…``. Statements of the tests run as root over the socket; the
    filter's own user comes from etc/sql. ``directory`` is made where it is missing; its path must be short.
    """

    def __init__(self, directory: Path, *extra: str) -> None:
        super().__init__(directory)
        self._extra = extra
        self.socket = str(directory / "db.sock")
        self.port = free_port()
        self._user = "mysql" if os.geteuid() == 0 else getpass.getuser()

    def start(self) -> Self:
        program = find_program("mariadbd", PACKAGE)
        data, temporary = self.directory / "data", self.directory / "tmp"
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            pwd.getpwnam(self._user)
            if user_who_reaches(self.directory, self._user) is None:
                raise PermissionError(f"{self._user} cannot reach {self.directory}")
            shutil.chown(self.directory, self._user)
        temporary.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(temporary, self._user)
        if not data.exists():
            self._install(data, temporary)
        options = (f"--datadir={data}", f"--socket={self.socket}", f"--port={self.port}", f"--tmpdir={temporary}")
        place = ("--bind-address=127.0.0.1", f"--pid-file={self.directory / 'pid'}", f"--user={self._user}")
        self.launch([program, *_FAST, *options, *place, *self._extra], self._answers, 60.0)
        return self

    def _install(self, data: Path, temporary: Path) -> None:
        """The system tables. In /tmp a server that starts meanwhile would take its temporary tables for leftovers."""
        command = [
            find_program("mariadb-install-db", PACKAGE),
            "--no-defaults",
            f"--datadir={data}",
            f"--tmpdir={temporary}",
            f"--user={self._user}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-log-bin",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"mariadb-install-db: {done.stdout[-1000:]}{done.stderr[-1000:]}")

    def _answers(self) -> bool:
        return self._client("SELECT 1", database="").returncode == 0

    def run(self, sql: str, database: str = DATABASE) -> str:
        """Run statements as root; what they print, tab between columns. Raises RuntimeError with the server's words."""
        done = self._client(sql, database)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def _client(self, sql: str, database: str) -> "subprocess.CompletedProcess[str]":
        command = [find_program("mariadb", "mariadb-client"), "--no-defaults", f"--socket={self.socket}", "--user=root"]
        words = [*command, "--batch", "--skip-column-names", *([database] if database else [])]
        return subprocess.run(words, input=sql, capture_output=True, text=True, timeout=120)
