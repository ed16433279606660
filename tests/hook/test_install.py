"""``contentfilter hook``: reversible, idempotent, never without a qmail-queue, and no loops."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from lab.hook import HookLab, HookProcess, accepted

from contentfilter import qmail
from contentfilter.cli.hook import hook as command

ORIGINAL = b"#!/bin/sh\nexit 0\n"


class Site:
    """A qmail with a qmail-queue, and the command that works on it."""

    def __init__(self, directory: Path, program: Path) -> None:
        self.qmail = directory / "qmail"
        self.bin = self.qmail / "bin"
        self.bin.mkdir(parents=True)
        self.queue = self.bin / "qmail-queue"
        self.real = self.bin / "qmail-queue.real"
        self.conf = directory / "etc" / "queue.conf"
        self.program = program
        self.write(ORIGINAL)

    def write(self, content: bytes, mode: int = 0o4711) -> None:
        self.queue.write_bytes(content)
        self.queue.chmod(mode)

    def run(self, *arguments: str) -> Result:
        fixed = ["--qmail", str(self.qmail), "--conf", str(self.conf), "--binary", str(self.program)]
        return CliRunner().invoke(command, [arguments[0], *fixed, *arguments[1:]])

    def done(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    def files(self) -> dict[str, tuple[int, int, int, int, bytes]]:
        found = [path for path in (*self.bin.iterdir(), self.conf) if path.exists()]
        about = {path.name: path.lstat() for path in found}
        return {p.name: (*_identity(about[p.name]), p.read_bytes()) for p in found}


def _identity(about: os.stat_result) -> tuple[int, int, int, int]:
    return about.st_ino, about.st_mode, about.st_uid, about.st_gid


@pytest.fixture
def site(tmp_path: Path, hook_program: Path) -> Site:
    return Site(tmp_path, hook_program)


def test_install_keeps_the_original_and_uninstall_puts_it_back_exactly(site: Site) -> None:
    before = site.files()
    site.done("install")
    after = site.files()
    assert after["qmail-queue.real"] == before["qmail-queue"]
    assert after["qmail-queue"][4] == site.program.read_bytes()
    assert stat.S_IMODE(after["qmail-queue"][1]) == 0o755
    assert after["qmail-queue"][2:4] == (os.geteuid(), os.getegid())
    site.done("uninstall")
    assert site.files() == before


@pytest.mark.parametrize("sub", ["install", "uninstall"])
def test_a_second_time_changes_nothing(site: Site, sub: str) -> None:
    site.done("install")
    if sub == "uninstall":
        site.done("uninstall")
    before = site.files()
    assert ("already" if sub == "install" else "not installed") in site.done(sub)
    assert site.files() == before


@pytest.mark.parametrize("sub", ["install", "uninstall"])
def test_a_dry_run_changes_nothing_and_says_what_would_be(site: Site, sub: str) -> None:
    if sub == "uninstall":
        site.done("install")
    before = site.files()
    assert "would " in site.done(sub, "--dry-run")
    assert site.files() == before


def test_at_no_step_is_there_no_qmail_queue(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watch(function: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **options: object) -> object:
            seen.append(os.access(site.queue, os.X_OK))
            result = function(*args, **options)
            seen.append(os.access(site.queue, os.X_OK))
            return result

        return watched

    for name in ("link", "replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, watch(getattr(os, name)))
    site.done("install")
    site.done("uninstall")
    assert len(seen) > 10
    assert all(seen)


def test_queue_conf_is_written_for_this_qmail_and_goes_with_the_hook(site: Site) -> None:
    site.done("install", "--dialect", "sagredo")
    read = qmail.read_conf(site.program, site.conf)
    assert (read.values["queue"], read.values["dialect"]) == (str(site.real), "sagredo")
    site.done("uninstall")
    assert not site.conf.exists()


def test_an_edited_queue_conf_stays(site: Site) -> None:
    site.done("install")
    with site.conf.open("a") as conf:
        conf.write("budget 100\n")
    assert "kept, it was edited" in site.done("uninstall")
    assert site.conf.exists()


def test_an_older_hook_is_replaced_and_the_original_kept(site: Site) -> None:
    site.done("install")
    original = site.files()["qmail-queue.real"]
    site.queue.write_bytes(site.program.read_bytes() + b"older")
    assert "replace version" in site.done("install")
    assert site.queue.read_bytes() == site.program.read_bytes()
    assert site.files()["qmail-queue.real"] == original


def test_a_qmail_upgrade_over_the_hook_needs_force(site: Site) -> None:
    site.done("install")
    site.queue.unlink()
    site.write(b"new qmail-queue")
    refused = site.run("install")
    assert refused.exit_code == 1
    assert "--force" in refused.output
    site.done("install", "--force")
    assert site.real.read_bytes() == b"new qmail-queue"
    assert qmail.version_of(site.queue) is not None


def test_an_interrupted_install_can_go_on_or_back(site: Site) -> None:
    before = site.files()
    os.link(site.queue, site.real)
    site.done("uninstall")
    assert site.files() == before
    os.link(site.queue, site.real)
    site.done("install")
    assert qmail.version_of(site.queue) is not None
    site.done("uninstall")
    assert site.files() == before


def test_a_qmail_queue_that_is_gone_comes_back(site: Site) -> None:
    site.done("install")
    site.queue.unlink()
    site.done("uninstall")
    assert site.queue.read_bytes() == ORIGINAL


def refused(site: Site, *arguments: str, says: str, status: int = 1) -> None:
    before = site.files()
    result = site.run(*arguments)
    assert (result.exit_code, says in result.output) == (status, True), result.output
    assert site.files() == before


def test_no_qmail_there(site: Site) -> None:
    site.queue.unlink()
    refused(site, "install", says="check the directory of qmail")


def test_not_executable(site: Site) -> None:
    site.write(ORIGINAL, 0o644)
    refused(site, "install", says="not executable")


def test_not_setuid_is_a_warning(site: Site) -> None:
    site.write(ORIGINAL, 0o755)
    assert "not setuid" in site.done("install")


def test_a_hook_in_the_place_of_the_original_would_loop(site: Site) -> None:
    site.done("install")
    site.real.unlink()
    site.real.write_bytes(site.program.read_bytes() + b"x")
    site.real.chmod(0o4755)
    refused(site, "install", says="would be a loop")
    refused(site, "uninstall", says="would be a loop")


def test_the_original_is_missing(site: Site) -> None:
    site.done("install")
    site.real.unlink()
    refused(site, "install", says="does not exist")
    refused(site, "uninstall", says="does not exist")


def test_a_conf_that_leads_back_would_loop(site: Site) -> None:
    site.conf.parent.mkdir()
    site.conf.write_text(f"queue {site.queue}\n")
    refused(site, "install", says="would be a loop")


def test_a_conf_that_the_hook_would_not_take(site: Site) -> None:
    site.conf.parent.mkdir()
    site.conf.write_text("queue /x\nbudgte 5\n")
    refused(site, "install", says="queue.conf:2: budgte: unknown")


def test_a_binary_that_is_no_hook(site: Site) -> None:
    site.program = site.queue
    refused(site, "install", says="--binary")


def test_unwritable_places_are_a_clear_error_and_nothing_is_changed(site: Site) -> None:
    site.conf.parent.write_text("a file where the directory should be")
    refused(site, "install", says="nothing was changed")


def test_a_wrong_option_is_wrong_usage(site: Site) -> None:
    refused(site, "install", "--dialect", "postfix", says="postfix", status=2)


def state(site: Site, status: int) -> dict[str, object]:
    result = site.run("status", "--json")
    assert result.exit_code == status, result.output
    shown: dict[str, object] = json.loads(result.stdout)
    return shown


def test_status_of_a_good_installation(site: Site, lab: HookLab) -> None:
    site.done("install")
    lab.daemon(accepted())
    with site.conf.open("a") as conf:
        conf.write(f"socket {lab.socket}\n")
    shown = state(site, 0)
    assert shown["problems"] == []
    assert (shown["installed"], shown["current"], shown["original_setuid"], shown["socket_answers"]) == (True,) * 4
    assert shown["target"] == str(site.real)
    assert "hook version:" in site.done("status")


def test_status_names_what_is_wrong(site: Site, tmp_path: Path) -> None:
    assert "is not the hook" in str(state(site, 1)["problems"])
    site.done("install")
    base = f"socket {tmp_path}/none\n"
    site.conf.write_text(base + f"queue {site.real}\n")
    assert "no process listens" in str(state(site, 1)["problems"])
    site.conf.write_text(base + f"queue {site.queue}\n")
    assert "loop: " in str(state(site, 1)["problems"])
    site.conf.write_text(base + "queue /nonexistent\n")
    assert "is missing" in str(state(site, 1)["problems"])
    site.conf.write_text(base + f"queue {site.real}\nbudget x\n")
    assert "queue.conf:3: budget" in str(state(site, 78)["problems"])
    site.conf.write_text(base + f"queue {site.real}\n")
    site.queue.write_bytes(site.program.read_bytes() + b"older")
    assert "differs from" in str(state(site, 1)["problems"])


def test_mail_passes_through_an_installed_hook_and_without_it_again(site: Site, lab: HookLab) -> None:
    site.write(lab.standin.program.read_bytes(), 0o755)
    site.done("install")
    with site.conf.open("a") as conf:
        conf.write(f"socket {lab.socket}\n")
    lab.daemon(accepted(b"X-Seen: yes\n"))
    environ = lab.standin.environ() | {"CONTENTFILTER_QUEUE_CONF": str(site.conf)}
    for expected in (b"X-Seen: yes\nm\n", b"m\n"):
        process = HookProcess(site.queue, b"m\n", b"Fs\0Tr\0\0", environ, {}, lab.directory)
        assert process.wait().status == 0
        assert expected in [q.message for q in lab.standin.queued()]
        site.done("uninstall")
