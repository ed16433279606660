"""A signature is let through and found again, live, while mail flows; classes against a real clamd."""

import io
import json
import subprocess
import sys
import zipfile
from base64 import encodebytes

from e2e.mails import VIRUS
from lab.clamd import EICAR_NAME, Clamd
from lab.system import System


def run(system: System, *words: str, status: int = 0) -> str:
    command = [sys.executable, "-P", "-m", "contentfilter", "--config", str(system.daemon.config), "allow", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_allow_is_in_force_immediately_and_ends_when_it_is_removed(make_system, clamd) -> None:
    system = make_system(clamd=clamd, settings={"tables": {"refresh": 3600}})
    assert system.deliver(VIRUS).status == 82
    said = run(system, "add", EICAR_NAME, "--for", "1h", "--reason", "test of the test")
    assert "passes until" in said
    assert "in force in every worker" in said
    d = system.deliver(VIRUS)
    assert d.status == 0
    assert b"virus=clean" in d.only.message
    record = system.daemon.wait_for("mail.done", count=2)[1]
    scan = next(s for s in record["scans"] if s["scanner"] == "clamd")
    assert "test of the test" in scan["detail"]
    (listed,) = json.loads(run(system, "list", "--json"))
    assert (listed["signature"], listed["reason"]) == (EICAR_NAME, "test of the test")
    run(system, "remove", EICAR_NAME)
    assert system.deliver(VIRUS).status == 82
    assert json.loads(run(system, "list", "--json")) == []
    assert "not on the list" in run(system, "remove", EICAR_NAME, status=1)


def test_a_damaged_list_allows_nothing_and_stops_no_mail(make_system, clamd) -> None:
    system = make_system(clamd=clamd)
    system.daemon.stop()
    (system.directory / "state" / "allow.json").write_text("{not json")
    system.daemon.start()
    system.daemon.wait_for("service.problem", where=lambda line: "allow.json" in line["path"])
    assert system.deliver(VIRUS).status == 82
    assert "damaged" in run(system, "list", status=78)


def test_allow_while_the_daemon_is_stopped_holds_from_its_start(make_system, clamd) -> None:
    system = make_system(clamd=clamd)
    system.daemon.stop()
    assert "from its next start" in run(system, "add", EICAR_NAME, "--for", "1h", "--reason", "r")
    system.daemon.start()
    assert system.deliver(VIRUS).status == 0


def test_wrong_use(make_system) -> None:
    system = make_system()
    assert "30m, 12h, 3d" in run(system, "add", "X", "--for", "soon", "--reason", "r", status=2)
    assert "printable" in run(system, "add", "two words", "--for", "1h", "--reason", "r", status=2)


def encrypted() -> bytes:
    """A mail with a ZIP whose only member claims to need a password."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("secret.txt", b"hidden" * 100)
    data = bytearray(file.getvalue())
    data[6] |= 1  # general purpose flag of the local header
    data[data.index(b"PK\1\2") + 8] |= 1  # and of the directory
    return (
        b'Subject: zip\nMIME-Version: 1.0\nContent-Type: application/zip; name="a.zip"\n'
        b"Content-Transfer-Encoding: base64\n\n" + encodebytes(bytes(data))
    )


def test_encrypted_archives_have_their_own_action(make_system, lab_directory) -> None:
    with Clamd(lab_directory / "clamd-encrypted", "AlertEncrypted yes") as clamd:
        refused = make_system(clamd=clamd).deliver(encrypted())
        assert "Heuristics.Encrypted.Zip" in refused.text
        marked = make_system(clamd=clamd, settings={"classes": {"encrypted": "mark"}}).deliver(encrypted())
        assert b"virus=found" in marked.only.message
        passed = make_system(clamd=clamd, settings={"classes": {"encrypted": "pass"}}).deliver(encrypted())
        assert b"virus=clean" in passed.only.message


def test_clamds_limits_are_unchecked_not_infected(make_system, lab_directory) -> None:
    options = ("MaxFileSize 1M", "AlertExceedsMax yes")
    with Clamd(lab_directory / "clamd-limits", *options) as clamd:
        large = b"Subject: large\n\n" + b"x" * 2_000_000
        passed = make_system(clamd=clamd).deliver(large)
        assert b"virus=unchecked" in passed.only.message
        deferred = make_system(clamd=clamd, settings={"failure": {"limits": "defer"}}).deliver(large)
        assert deferred.text.startswith("Zvirus check not possible now (limits)")
