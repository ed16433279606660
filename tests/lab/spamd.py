"""A real spamd with Debian's rules and plug-ins, no network tests, on a Unix socket and on TCP.

Preferences of a user are files (:meth:`Spamd.prefer`), so the ``User:`` header can be seen at work, or rows of a
database (``sql``).
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lab.process import ScannerDaemon, ask, find_program, own_name, user_who_reaches

GTUBE = b"".join((b"XJS*C4JDBQADN1.NSBN3*2IDNEN*", b"GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL", b"*C.34X"))
PLUGINS = Path("/etc/spamassassin")


class Spamd(ScannerDaemon):
    """``with Spamd(directory) as spamd:`` then ``spamd.socket``, ``spamd.tcp``, ``spamd.pid``.

    ``extra``: lines for local.cf. ``sql``: the preferences come from the database that these lines name.
    ``options``: more words for its command line; --ssl-verify makes all its ports TLS.
    ``directory`` is made where it is missing; its path must be short enough for a Unix socket. Started by root, its
    children run as nobody; otherwise as the user who starts it.
    """

    def __init__(
        self, directory: Path, *extra: str, children: int = 2, sql: bool = False, options: Sequence[str] = ()
    ) -> None:
        super().__init__(directory)
        self._options = tuple(options)
        self._extra = extra
        self._children = children
        self._sql = sql
        self._user: str | None = None
        self._users = directory / "users"

    def prefer(self, user: str, *lines: str) -> None:
        """Write the preferences of ``user``; they count from the next message on."""
        assert self._user is not None, "without the name of a user, spamd reads no preferences"
        home = self._users / user
        home.mkdir(parents=True, exist_ok=True)
        (home / "user_prefs").write_text("\n".join((*lines, "")))
        shutil.chown(home, self._user)

    def users(self) -> list[str]:
        """Users whose preferences the requests so far asked for, in order; "(unknown)" where there was none."""
        text = self.log.read_text("latin-1")
        return re.findall(r"spamd: (?:checking|processing) message .* for (\S+):\d+$", text, re.MULTILINE)

    def start(self) -> Self:
        program = find_program("spamd", "spamd")
        site, home = self.directory / "site", self.directory / "home"
        for path in (site, home, self._users):
            path.mkdir(parents=True, exist_ok=True)
        for plugins in PLUGINS.glob("*.pre"):
            shutil.copy(plugins, site)
        local = ("use_bayes 0", "report_safe 0", "dns_available no", *self._extra)
        (site / "local.cf").write_text("\n".join((*local, "")))
        # Debian's spamd reads preferences only where --username names the user of its children, and never as root.
        self._user = user_who_reaches(self.directory, "nobody") if os.geteuid() == 0 else own_name()
        command = [
            program,
            "--local",
            "--nouser-config",
            f"--siteconfigpath={site}",
            f"--helper-home-dir={home}",
            f"--max-children={self._children}",
            f"--min-children={self._children}",
            f"--socketpath={self.socket}",
            "--socketmode=0666",
            f"--listen={self.tcp[0]}:{self.tcp[1]}",
            "--syslog=stderr",
            f"--pidfile={self.directory / 'pid'}",
            *self._options,
        ]
        if self._user is not None:
            preferences = "--sql-config" if self._sql else f"--virtual-config-dir={self._users}/%u"
            command += [f"--username={self._user}", preferences]
            for path in (home, self._users):
                shutil.chown(path, self._user)
        ping = b"PING SPAMC/1.5\r\n\r\n"
        plain = [self.socket] if "--ssl-verify" in self._options else [self.socket, self.tcp]
        self.launch(command, lambda: all(b" PONG" in ask(each, ping) for each in plain))
        return self
