"""A certificate authority for one test, made with the ``openssl`` command: private, and gone with its directory."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.process import find_program


@dataclass(frozen=True)
class Pair:
    """PEM files."""

    cert: str
    key: str


class Authority:
    """``Authority(directory)`` then ``issue("name", "DNS:scan.example")``."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._openssl = find_program("openssl", "openssl")
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._own = Pair(str(directory / f"{name}.crt"), str(directory / f"{name}.key"))
        subject = ["-subj", f"/CN=lab {name}", "-days", "2"]
        self._run("req", "-x509", *self._new_key(self._own), *subject, "-out", self._own.cert)
        self.ca = self._own.cert

    def issue(self, name: str, names: str = "IP:127.0.0.1", *, expired: bool = False) -> Pair:
        """A certificate for ``names`` as in subjectAltName. ``expired``: since yesterday."""
        pair = Pair(str(self._directory / f"{name}.crt"), str(self._directory / f"{name}.key"))
        request, extensions = self._directory / f"{name}.csr", self._directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        self._run("req", *self._new_key(pair), "-subj", f"/CN={name}", "-out", str(request))
        signed = ["-CA", self._own.cert, "-CAkey", self._own.key, "-CAcreateserial"]
        more = ["-days", "-1" if expired else "1", "-extfile", str(extensions), "-out", pair.cert]
        self._run("x509", "-req", "-in", str(request), *signed, *more)
        Path(pair.key).chmod(0o644)  # spamd reads it under its own user
        return pair

    def _new_key(self, pair: Pair) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", pair.key]

    def _run(self, *words: str) -> None:
        subprocess.run([self._openssl, *words], check=True, capture_output=True, timeout=30)
