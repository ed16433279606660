"""``contentfilter install`` and ``uninstall`` in a directory that represents the machine."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from style.tree import ROOT

from contentfilter.admin import install as ops
from contentfilter.admin.install_items import Manifest, System
from contentfilter.cli.main import cli

Listing = dict[str, tuple[int, str]]
UNITS = "usr/local/lib/systemd/system"


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """Something that can be called, where a package would have put it."""
    program = tmp_path / "venv" / "bin" / "contentfilter"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A machine with systemd, a qmail, and files of other packages."""
    root = tmp_path / "root"
    for name in ("run/systemd/system", "etc", "usr/local/sbin", "var/lib/other", "var/qmail/bin", "var/qmail/control"):
        (root / name).mkdir(parents=True)
    (root / "usr/local/sbin/theirs").write_text("theirs")
    (root / "var/qmail/bin/qmail-queue").write_text("the real one")
    return root


@pytest.fixture
def run(prefix: Path, command: Path) -> Callable[..., Result]:
    def call(name: str, *options: str) -> Result:
        words = [name, "--prefix", str(prefix), *options]
        if name == "install" and "--command" not in options:
            words += ["--command", str(command)]
        return CliRunner().invoke(cli, words)

    return call


def listing(root: Path) -> Listing:
    """Everything below ``root``: mode, and what is in it."""
    found: Listing = {}
    for path in sorted(root.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else ""
        found[str(path.relative_to(root))] = (path.lstat().st_mode, hashlib.sha256(content.encode()).hexdigest())
    return found


# Round trips


def test_uninstall_with_purge_leaves_what_was_there_before(prefix: Path, run: Callable[..., Result]) -> None:
    before = listing(prefix)
    assert run("install").exit_code == 0
    assert listing(prefix) != before
    done = run("uninstall", "--purge")
    assert done.exit_code == 0, done.output
    assert listing(prefix) == before


def test_uninstall_keeps_settings_and_state_and_a_later_purge_finds_them(
    prefix: Path, run: Callable[..., Result]
) -> None:
    before = listing(prefix)
    run("install")
    (prefix / "var/lib/contentfilter/quarantine").mkdir()
    (prefix / "var/lib/contentfilter/quarantine/kept").write_text("mail")
    (prefix / "run/contentfilter/control.sock").write_text("left by a daemon")
    (prefix / "etc/contentfilter/contentfilter.toml").write_text("[service]\nworkers = 3\n")
    assert run("uninstall").exit_code == 0
    assert set(listing(prefix)) - set(before) == {
        "etc/contentfilter",
        "etc/contentfilter/contentfilter.toml",
        "etc/contentfilter/installed.json",
        "var/lib/contentfilter",
        "var/lib/contentfilter/quarantine",
        "var/lib/contentfilter/quarantine/kept",
    }
    assert "nothing to remove" in run("uninstall").stdout
    assert run("uninstall", "--purge").exit_code == 0
    assert listing(prefix) == before


def test_installed_again_after_an_uninstallation_everything_can_go(prefix: Path, run: Callable[..., Result]) -> None:
    before = listing(prefix)
    for name in ("install", "uninstall", "install"):
        assert run(name).exit_code == 0
    run("uninstall", "--purge")
    assert listing(prefix) == before


def test_directories_above_what_was_kept_go_with_it(tmp_path: Path, command: Path) -> None:
    root = tmp_path / "bare"
    root.mkdir()
    for words in (["install", "--command", str(command)], ["uninstall"], ["uninstall", "--purge"]):
        assert CliRunner().invoke(cli, [*words, "--prefix", str(root)]).exit_code == 0
        assert (root / "var/lib/contentfilter").exists() == (words[-1] != "--purge")
    assert list(root.iterdir()) == []


def test_a_second_install_changes_nothing(prefix: Path, run: Callable[..., Result]) -> None:
    run("install")
    once = listing(prefix)
    again = run("install")
    assert (again.exit_code, again.stdout.splitlines()[0]) == (0, "already installed")
    assert listing(prefix) == once


@pytest.mark.parametrize("count", range(1, 14))
def test_an_interrupted_install_can_be_undone(
    prefix: Path, command: Path, run: Callable[..., Result], count: int
) -> None:
    before = listing(prefix)
    plan = ops.plan_install(ops.Package.find(str(command)), System(prefix), "/var/qmail")
    assert len(plan.steps) > 13
    for step in plan.steps[:count]:
        step.do()
    assert run("uninstall", "--purge").exit_code == 0
    # Only the manifest's own directory is made before there is an manifest.
    assert set(listing(prefix)) - set(before) <= ({"etc/contentfilter"} if count == 1 else set())


# What is written


def test_samples_are_installed_as_they_are_with_the_path_of_the_command(
    prefix: Path, command: Path, run: Callable[..., Result]
) -> None:
    run("install")
    etc = ROOT / "etc"
    assert (prefix / "etc/contentfilter/contentfilter.toml").read_bytes() == (etc / "contentfilter.toml").read_bytes()
    for name in ("contentfilter.socket", "contentfilter.service"):
        written = (prefix / UNITS / name).read_text()
        assert written == (etc / "systemd" / name).read_text().replace(
            "/opt/contentfilter/bin/contentfilter", str(command)
        )
    assert f"ExecStart={command} serve\n" in (prefix / UNITS / "contentfilter.service").read_text()
    assert os.readlink(prefix / "usr/local/sbin/contentfilter") == str(command)


def test_modes_keep_state_private_and_the_rest_readable(prefix: Path, run: Callable[..., Result]) -> None:
    before = os.umask(0o077)  # an administrator's umask changes nothing
    try:
        run("install")
    finally:
        os.umask(before)
    modes = {name: mode & 0o7777 for name, (mode, _) in listing(prefix).items()}
    assert modes["var/lib/contentfilter"] == 0o700
    assert modes["run/contentfilter"] == 0o755
    assert modes["etc/contentfilter"] == 0o755  # every user's hook reads queue.conf in it
    assert modes["etc/contentfilter/contentfilter.toml"] == 0o644
    assert modes[f"{UNITS}/contentfilter.service"] == 0o644


def test_another_qmail_is_named_in_the_settings(prefix: Path, run: Callable[..., Result]) -> None:
    run("install", "--qmail", "/opt/qmail")
    assert 'control = "/opt/qmail/control"\n' in (prefix / "etc/contentfilter/contentfilter.toml").read_text()


def test_manual_pages_are_linked_where_man_looks(prefix: Path, command: Path, tmp_path: Path) -> None:
    page = tmp_path / "share/man/man8/contentfilter.8"
    page.parent.mkdir(parents=True)
    page.write_text("page")
    package = ops.Package(command, ROOT / "etc", tmp_path / "share/man")
    for step in ops.plan_install(package, System(prefix), "/var/qmail").steps:
        step.do()
    assert (prefix / "usr/local/share/man/man8/contentfilter.8").read_text() == "page"
    assert not (prefix / "usr/local/share/man/man5").exists()  # no page, no link, no directory


def test_a_package_below_usr_needs_no_links(prefix: Path) -> None:
    package = ops.Package(Path("/usr/bin/env"), ROOT / "etc", Path("/usr/share/man"))
    assert [t.path for t in ops.wanted(package, System(prefix), "/var/qmail") if t.kind == "link"] == []


def test_without_systemd_there_are_no_units_but_a_run_script(
    prefix: Path, command: Path, run: Callable[..., Result]
) -> None:
    (prefix / "run/systemd/system").rmdir()
    done = run("install", "--start")
    assert done.exit_code == 0
    assert not (prefix / "usr/local/lib").exists()
    script = done.stdout[done.stdout.index("#!/bin/sh") :]
    assert f"setuidgid contentfilter {command} serve" in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    assert "systemctl" not in done.stdout


# What was there already


def test_what_exists_is_not_changed_and_not_removed(prefix: Path, run: Callable[..., Result]) -> None:
    (prefix / "etc/contentfilter").mkdir()
    (prefix / "etc/contentfilter/contentfilter.toml").write_text("[log]\nlevel = 'debug'\n")
    (prefix / UNITS).mkdir(parents=True)
    (prefix / UNITS / "contentfilter.service").write_text("# mine\n")
    before = listing(prefix)
    done = run("install")
    assert "contentfilter.service: kept, it was not made by this command" in done.stderr
    assert {name: entry for name, entry in listing(prefix).items() if name in before} == before
    run("uninstall", "--purge")
    assert listing(prefix) == before


def test_an_upgrade_renews_what_nobody_edited(prefix: Path, run: Callable[..., Result]) -> None:
    run("install")
    service, socket = (prefix / UNITS / f"contentfilter.{kind}" for kind in ("service", "socket"))
    new = service.read_text()
    manifest = Manifest.read(System(prefix))
    path = f"/{UNITS}/contentfilter.service"
    service.write_text("# of an older version\n")
    manifest.made[path] = (manifest.made[path][0], hashlib.sha256(service.read_bytes()).hexdigest())
    manifest.write(System(prefix))
    socket.write_text("# edited\n")
    done = run("install")
    assert f"replace {path}" in done.stdout
    assert "contentfilter.socket: kept, it was edited since it was installed" in done.stderr
    assert service.read_text() == new
    assert socket.read_text() == "# edited\n"
    assert "contentfilter.socket: kept, it was edited" in run("uninstall").stderr
    assert socket.exists()
    assert not service.exists()


def test_a_directory_that_others_use_by_then_stays(prefix: Path, run: Callable[..., Result]) -> None:
    run("install")
    (prefix / UNITS / "other.service").write_text("")
    assert run("uninstall", "--purge").exit_code == 0
    assert [path.name for path in (prefix / UNITS).iterdir()] == ["other.service"]


# Refusals


def test_a_dry_run_touches_nothing(prefix: Path, run: Callable[..., Result]) -> None:
    before = listing(prefix)
    done = run("install", "--dry-run")
    assert "would make /etc/contentfilter\n" in done.stdout
    assert listing(prefix) == before
    run("install")
    installed = listing(prefix)
    assert "would remove /var/lib/contentfilter\n" in run("uninstall", "--purge", "--dry-run").stdout
    assert listing(prefix) == installed


@pytest.mark.parametrize("name", ["install", "uninstall"])
def test_who_is_not_root_is_told_why_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = CliRunner().invoke(cli, [name])
    assert done.exit_code == 1
    assert "you are uid 1000, and only root may change users, units" in done.output


def test_a_failure_takes_everything_back(prefix: Path, run: Callable[..., Result]) -> None:
    (prefix / "usr/local/lib").write_text("a file where a directory should be")
    before = listing(prefix)
    done = run("install")
    assert done.exit_code == 1
    assert "/usr/local/lib" in done.stderr
    assert "nothing was changed" in done.stderr
    assert listing(prefix) == before


def test_while_the_hook_is_installed_the_daemon_cannot_be_removed(prefix: Path, run: Callable[..., Result]) -> None:
    run("install")
    (prefix / "var/qmail/bin/qmail-queue").write_bytes(b"\x7fELF contentfilter-queue 0.1.0 protocol 1\n")
    before = listing(prefix)
    done = run("uninstall", "--purge")
    assert done.exit_code == 1
    assert "first: contentfilter hook uninstall --qmail /var/qmail" in done.stderr
    assert listing(prefix) == before


@pytest.mark.parametrize(
    "manifest",
    [
        "nonsense",
        "[]",
        json.dumps({"qmail": "/var/qmail", "made": [{"kind": "file"}]}),
        json.dumps(
            {"qmail": "", "made": [{"kind": "file", "path": "/a/../etc/x", "keep": False, "whole": 0, "digest": ""}]}
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(prefix: Path, run: Callable[..., Result], manifest: str) -> None:
    run("install")
    (prefix / "etc/contentfilter/installed.json").write_text(manifest)
    before = listing(prefix)
    done = run("uninstall", "--purge")
    assert done.exit_code == 1
    assert "installed.json: not a manifest" in done.stderr
    assert listing(prefix) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_manifest_that_others_may_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "installed.json"
    path.write_text('{"qmail": "", "made": []}')
    monkeypatch.setattr(Manifest, "PATH", str(path))
    assert Manifest.read(System()).made == {}
    for mode, owner in ((0o666, 0), (0o644, 65534)):
        path.chmod(mode)
        os.chown(path, owner, 0)
        with pytest.raises(ops.RefusedError, match="users other than root can write it"):
            Manifest.read(System())


@pytest.mark.parametrize("path", ["/opt/content filter/bin/contentfilter", "/opt/100%/contentfilter", "contentfilter"])
def test_a_path_that_a_unit_cannot_hold_is_refused(prefix: Path, path: str) -> None:
    package = ops.Package(Path(path), ROOT / "etc", ROOT)
    with pytest.raises(ops.RefusedError, match="only absolute paths"):
        ops.plan_install(package, System(prefix), "/var/qmail")


def test_a_missing_command_is_named(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("install", "--command", str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert "nowhere; pip install it" in done.stderr


def test_a_program_that_the_service_cannot_reach_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "closed" / "python"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    program.parent.chmod(0o700)
    found = ops.unreachable([program])
    assert found is not None
    assert found.startswith(f"{program.parent} is not open to other users")
    assert ops.unreachable([Path("/bin/sh")]) is None
