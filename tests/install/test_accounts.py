"""User and directories of the daemon: by systemd's own tools, by useradd and mkdir where there is no systemd."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
from style.tree import ROOT

from contentfilter.admin import install_items
from contentfilter.admin.install_items import STATE, SYSUSERS, TMPFILES, USER, InstallItem, System

ACCOUNT = InstallItem("user", USER, keep=True)
RUN = InstallItem("directory", "/run/contentfilter", whole=True)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="creates users below another root directory")


class Recording(System):
    """A real system that does not run its commands but lists them."""

    ran: list[tuple[str, ...]] = []  # noqa: RUF012 - each test has its own class attribute, see the fixture

    @property
    def systemd(self) -> bool:
        return True

    def run(self, *words: str) -> None:
        self.ran.append(words)


@pytest.fixture
def accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """Users and groups that this machine seems to have, both empty."""
    users: set[str] = set()
    groups: set[str] = set()

    def look_up(names: set[str]) -> object:
        def found(name: str) -> str:
            if name not in names:
                raise KeyError(name)
            return name

        return found

    monkeypatch.setattr(install_items.pwd, "getpwnam", look_up(users))
    monkeypatch.setattr(install_items.grp, "getgrnam", look_up(groups))
    monkeypatch.setattr(Recording, "ran", [])
    return users, groups


@pytest.mark.usefixtures("accounts")
def test_systemd_creates_user_and_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for item in (ACCOUNT, RUN):
        Recording().make(item)
    assert Recording.ran == [
        ("systemd-sysusers", SYSUSERS),
        ("systemd-tmpfiles", "--create", "--prefix=/run/contentfilter", TMPFILES),
    ]


@pytest.mark.parametrize(("group", "option"), [(False, "--user-group"), (True, "--gid")])
def test_without_systemd_s_tools_a_left_over_group_is_used_again(
    monkeypatch: pytest.MonkeyPatch, accounts: tuple[set[str], set[str]], group: bool, option: str
) -> None:
    """userdel keeps a group that has other members, and then useradd --user-group fails."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    accounts[1].update({USER} if group else ())
    Recording().make(ACCOUNT)
    ((command, *words),) = Recording.ran
    assert command == "useradd"
    assert option in words
    assert ("--user-group" in words) != group


def test_a_user_without_the_group_is_noticed(accounts: tuple[set[str], set[str]]) -> None:
    users, groups = accounts
    users.add(USER)
    assert System().lacks_group
    groups.add(USER)
    assert not System().lacks_group


@as_root
@pytest.mark.parametrize("tool", ["systemd-sysusers", "useradd"])
@pytest.mark.parametrize("members", [None, "", "anna"])
def test_the_user_is_created_in_every_state_of_its_group(tmp_path: Path, tool: str, members: str | None) -> None:
    """The real programs in another root directory. ``members``: of a group that exists; None: there is none."""
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nanna:x:1000:1000::/:/bin/sh\n")
    left_over = "" if members is None else f"{USER}:x:990:{members}\n"
    (tmp_path / "etc/group").write_text(f"root:x:0:\nanna:x:1000:\n{left_over}")
    for name in ("shadow", "gshadow"):
        (tmp_path / "etc" / name).write_text("")
    if tool == "useradd":
        group = ["--user-group"] if members is None else ["--gid", USER]
        command = [tool, "--prefix", str(tmp_path), *install_items._USERADD[1:], *group, USER]
    else:
        conf = tmp_path / "sysusers.conf"
        shutil.copy(ROOT / "etc/sysusers.d/contentfilter.conf", conf)
        command = [tool, f"--root={tmp_path}", str(conf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith(f"{USER}:")]
    (group_row,) = [line for line in (tmp_path / "etc/group").read_text().splitlines() if line.startswith(f"{USER}:")]
    assert row.split(":")[3] == group_row.split(":")[2], "the user's group is the one of its name"
    assert row.split(":")[5:] == [STATE, "/usr/sbin/nologin"]
    assert group_row.endswith(f":{members or ''}")


@as_root
@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="needs systemd-tmpfiles")
def test_the_directories_get_their_owner_and_modes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    for name in ("passwd", "group"):
        shutil.copy(Path("/etc") / name, root / "etc")
    user = pwd.getpwnam("nobody")
    conf = (ROOT / "etc/tmpfiles.d/contentfilter.conf").read_text().replace(f" {USER} {USER} ", " nobody nogroup ")
    (root / "tmpfiles.conf").write_text(conf)
    for path, mode in ((RUN.path, 0o755), (STATE, 0o700)):
        command = ["systemd-tmpfiles", f"--root={root}", "--create", f"--prefix={path}", str(root / "tmpfiles.conf")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        status = (root / path.lstrip("/")).stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (mode, user.pw_uid, user.pw_gid)
