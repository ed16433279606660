"""The image and the compose sample, as far as they can be seen without an engine. docs/container.md tells the rest."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.daemon import Daemon
from lab.mariadb import MariaDb
from lab.peers import Peer
from lab.scrape import promtool
from style.tree import ROOT

import contentfilter
from contentfilter.config.load import load_settings
from contentfilter.endpoint import Address, parse_listen
from contentfilter.settings import Settings

CONTAINER = ROOT / "etc" / "container"
SETTINGS = CONTAINER / "settings" / "contentfilter.toml"
HEALTHY = CONTAINER / "healthy.py"


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """Of the exec form; anything else is no JSON and fails."""
        words: list[str] = json.loads(self.rest)
        return words


def instructions(path: Path) -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = filter(None, re.sub(r"\\\n", " ", text).splitlines())
    return [Instruction(*re.split(r"\s+", line.strip(), maxsplit=1)) for line in lines]


def stages(path: Path) -> dict[str, list[Instruction]]:
    """By name; the last one, which is the image, is called "image". Lines before the first FROM are ignored."""
    found: dict[str, list[Instruction]] = {}
    for instruction in instructions(path):
        if instruction.name == "FROM":
            name = re.search(r" AS (\w+)$", instruction.rest)
            stage = found.setdefault(name[1] if name else "image", [])
        elif not found:
            continue
        stage.append(instruction)
    return found


DOCKERFILES = [ROOT / "Dockerfile", CONTAINER / "spamd" / "Dockerfile"]


def only(stage: list[Instruction], name: str) -> str:
    (found,) = [each.rest for each in stage if each.name == name]
    return found


# The image


def test_there_are_stages_to_build_and_to_test_and_the_image_has_nothing_of_them_but_the_result() -> None:
    found = stages(ROOT / "Dockerfile")
    assert list(found) == ["base", "build", "test", "image"]
    assert only(found["image"], "FROM") == "base"
    assert only(found["image"], "COPY") == "--from=build /opt/contentfilter /opt/contentfilter"
    assert "make test" in [each.rest for each in found["test"] if each.name == "RUN"]
    assert [each for each in found["base"] + found["image"] if re.search(r"\b(gcc|musl|pip|make)\b", each.rest)] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=["contentfilter", "spamd"])
def test_the_base_is_one_tagged_image_that_can_be_replaced(path: Path) -> None:
    first, *others = instructions(path)
    assert first.name == "ARG"
    assert re.fullmatch(r"BASE=\S+/\S+:(?!latest)\S+", first.rest)
    outside = {each.rest.split()[0] for each in others if each.name == "FROM"} - set(stages(path))
    assert outside == {"${BASE}"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=["contentfilter", "spamd"])
def test_nothing_is_fetched_but_by_apt_and_pip(path: Path) -> None:
    assert "ADD" not in {each.name for each in instructions(path)}
    assert re.findall(r"https?:|\bcurl\b|\bwget\b|\bgit\b", "\n".join(each.rest for each in instructions(path))) == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=["contentfilter", "spamd"])
def test_the_image_runs_without_root_and_without_a_shell_and_says_whether_it_is_well(path: Path) -> None:
    image = stages(path)["image"]
    names = [each.name for each in image]
    assert only(image, "USER").partition(":")[0] not in {"", "0", "root"}
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :]), "done as the image's user"
    for name in ("ENTRYPOINT", "CMD"):
        (each,) = [each for each in image if each.name == name]
        assert each.words
    health = only(image, "HEALTHCHECK")
    assert Instruction("CMD", health.partition(" CMD ")[2]).words
    assert only(image, "STOPSIGNAL") == "SIGTERM"


def test_the_image_fits_the_defaults() -> None:
    image, defaults = stages(ROOT / "Dockerfile")["image"], Settings()
    assert json.loads(only(image, "VOLUME")) == [defaults.service.run, defaults.service.state]
    assert only(image, "EXPOSE") == defaults.http.listen.rpartition(":")[2]
    made = next(each.rest for each in image if each.name == "RUN")
    uid, gid = only(image, "USER").split(":")
    assert f"--uid {uid} --gid {gid} " in made
    for directory in (defaults.service.run, defaults.service.state):
        assert re.search(rf"install -d -o contentfilter -g contentfilter -m 07\d\d {directory}(?: |$)", made)
    for directory in ("/etc/contentfilter", defaults.service.control):
        assert re.search(rf"install -d -m 0755 .*{directory}(?: |$)", made)
    assert f'version="{contentfilter.__version__}"' in only(image, "LABEL")
    health = json.loads(only(image, "HEALTHCHECK").partition(" CMD ")[2])
    assert health[-1] == f"/opt/contentfilter/share/contentfilter/{HEALTHY.relative_to(ROOT / 'etc')}"


def test_what_git_ignores_stays_out_of_the_image_too() -> None:
    def names(path: Path) -> set[str]:
        lines = path.read_text().splitlines()
        return {line.strip("/").removeprefix("**/") for line in lines if not line.startswith("#")}

    ignored = {name for name in names(ROOT / ".gitignore") if not name.endswith("_cache")}
    assert ignored - names(ROOT / ".dockerignore") == set()
    assert {".git", ".*_cache"} <= names(ROOT / ".dockerignore")


# The health check


def healthy(config: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-P", HEALTHY, config], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_health_check_says_ready_while_the_daemon_is_and_fails_when_it_is_gone(tmp_path: Path) -> None:
    with Daemon({"service": {"workers": 1}, "http": {"listen": "0.0.0.0:0"}}) as daemon:
        port = daemon.wait_for("http.ready")[-1]["address"].rpartition(":")[2]
        config = tmp_path / "contentfilter.toml"
        config.write_text(f'[http]\nlisten = "0.0.0.0:{port}"\n')
        assert healthy(config) == (0, "ready\n")
    status, said = healthy(config)
    assert status == 1
    assert said.startswith(f"no answer from 0.0.0.0:{port}: ")


def test_the_health_check_fails_with_the_daemons_own_words_when_it_is_not_ready(tmp_path: Path) -> None:
    words = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 31\r\n\r\n1 of 2 workers accept mail now\n"
    config = tmp_path / "contentfilter.toml"

    def answer(peer: Peer, connection: socket.socket) -> None:
        peer.read(connection)
        connection.sendall(words)

    with Peer(None, answer, lambda connection: connection.recv(8192)) as peer:
        config.write_text(f'[http]\nlisten = "{peer.backend.removeprefix("tcp:")}"\n')
        assert healthy(config) == (1, "1 of 2 workers accept mail now\n")


def test_the_health_check_fails_where_http_is_off(tmp_path: Path) -> None:
    config = tmp_path / "contentfilter.toml"
    config.write_text('[http]\nlisten = "off"\n')
    status, said = healthy(config)
    assert status == 1
    assert '"off"' in said


# The compose sample

COMPOSE: dict[str, Any] = yaml.safe_load((CONTAINER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
services = pytest.mark.parametrize("name", SERVICES)


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Source, target, whether it is read-only."""
    for volume in service.get("volumes", ()):
        if isinstance(volume, str):
            source, target, *mode = volume.split(":")
            yield source, target, mode == ["ro"]
        else:
            yield volume["source"], volume["target"], volume.get("read_only", False)


def dockerfile(name: str) -> Path | None:
    built = SERVICES[name].get("build")
    return (CONTAINER / built / "Dockerfile").resolve() if built else None


def networks(name: str) -> set[str]:
    return set(SERVICES[name].get("networks", ["default"]))


def test_the_sample_has_everything() -> None:
    assert set(SERVICES) == {"contentfilter", "clamd", "spamd", "mariadb", "prometheus"}
    assert dockerfile("contentfilter") == ROOT / "Dockerfile"


@services
def test_every_image_is_built_here_or_pinned(name: str) -> None:
    path = dockerfile(name)
    if path is not None:
        assert path in DOCKERFILES
    else:
        assert re.fullmatch(r"docker\.io/[\w./-]+:v?\d+\.\d[\w.]*", SERVICES[name]["image"])


@services
def test_everything_that_is_mounted_exists(name: str) -> None:
    service = SERVICES[name]
    for source, target, read_only in mounts(service):
        if source.startswith("."):
            assert (CONTAINER / source).exists(), source
            assert read_only, f"{source} would be written by a container"
        elif not source.startswith("${"):
            assert source in COMPOSE["volumes"], source
        assert target.startswith("/")
    assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
    assert networks(name) <= set(COMPOSE["networks"])


@services
def test_every_service_has_a_health_check_and_limits_and_gets_no_new_privileges(name: str) -> None:
    service, path = SERVICES[name], dockerfile(name)
    assert "healthcheck" in service or (path and only(stages(path)["image"], "HEALTHCHECK"))
    assert service["restart"] == "unless-stopped"
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*g", service["mem_limit"])
    assert service["pids_limit"] > 0
    assert service["logging"]["options"].keys() >= {"max-size", "max-file"}, "logs would fill the disk"


def test_ours_has_no_capability_and_writes_to_its_volumes_only() -> None:
    for name in ("contentfilter", "spamd"):
        assert SERVICES[name]["read_only"] is True
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert "privileged" not in SERVICES[name]
    written = {target for _, target, read_only in mounts(SERVICES["contentfilter"]) if not read_only}
    assert written == {Settings().service.run, Settings().service.state}


def test_nobody_else_can_connect() -> None:
    for name, service in SERVICES.items():
        assert [port for port in service.get("ports", ()) if not port.startswith("127.0.0.1:")] == [], name
        assert "network_mode" not in service
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert {name for name in SERVICES if "database" in networks(name)} == {"contentfilter", "mariadb"}


def test_passwords_come_from_files_outside_of_the_repository() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable:
                assert variable.endswith("_FILE")
                assert value.removeprefix("/run/secrets/") in service["secrets"]
    for secret in COMPOSE["secrets"].values():
        assert re.match(r"\$\{\w+:-/", secret["file"])


def test_what_waits_for_a_healthy_one_waits_for_one_with_a_health_check() -> None:
    for service in SERVICES.values():
        wanted = service.get("depends_on", {})
        assert set(wanted) <= set(SERVICES)
        for name in wanted if isinstance(wanted, dict) else ():
            if wanted[name]["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]


def test_the_daemon_gets_the_time_to_finish() -> None:
    grace = int(SERVICES["contentfilter"]["stop_grace_period"].removesuffix("s"))
    assert grace >= load_settings(str(SETTINGS)).service.drain + 10


# Settings of the services


def test_the_settings_lead_to_the_other_services() -> None:
    settings = load_settings(str(SETTINGS))
    spamd = json.loads(only(stages(CONTAINER / "spamd" / "Dockerfile")["image"], "ENTRYPOINT"))
    (listen,) = [word.rpartition(":")[2] for word in spamd if word.startswith("--listen=")]
    ports = {"clamd": 3310, "spamd": int(listen), "mariadb": 3306}
    for text in (*settings.clamd.backends, *settings.spamd.backends, f"tcp:{settings.mariadb.host}:3306"):
        address = Address.parse(text)
        assert ports.pop(address.host) == address.port
        assert networks(address.host) & networks("contentfilter")
    assert ports == {}
    assert settings.tables.source == "mariadb"
    assert settings.mariadb.password_file.removeprefix("/run/secrets/") in SERVICES["contentfilter"]["secrets"]
    assert settings.mariadb.user == SERVICES["mariadb"]["environment"]["MARIADB_USER"]
    assert settings.mariadb.database == SERVICES["mariadb"]["environment"]["MARIADB_DATABASE"]
    users = (*settings.origin.smtp_users, *settings.origin.bounce_users)
    assert [user for user in users if not user.isdecimal()] == [], "the image knows no names"


def test_prometheus_finds_the_daemon_and_its_rules_where_they_are_mounted(tmp_path: Path) -> None:
    for source, target, _ in mounts(SERVICES["prometheus"]):
        if source.startswith("."):
            shutil.copytree(CONTAINER / source, tmp_path / target.removeprefix("/"))
    said = promtool("check", "config", tmp_path / "etc" / "prometheus" / "prometheus.yml")
    assert re.search(r"SUCCESS: .*prometheus.yml is valid", said)
    assert re.search(r"SUCCESS: \d\d+ rules found", said)
    (job,) = yaml.safe_load((CONTAINER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    host, port = parse_listen(load_settings(str(SETTINGS)).http.listen) or ("", 0)
    assert host == "0.0.0.0", "other containers could not connect"
    assert job["static_configs"] == [{"targets": [f"contentfilter:{port}"]}]
    assert job["job_name"] == "contentfilter"  # the alerts ask for it
    assert networks("prometheus") & networks("contentfilter")


def test_the_database_lets_the_filter_read_the_tables_and_nothing_else(lab_directory: Path, tmp_path: Path) -> None:
    """As the image of MariaDB makes it: database, user with all rights in it, then the scripts in their order."""
    scripts = sorted(
        (target, CONTAINER / source) for source, target, _ in mounts(SERVICES["mariadb"]) if "init" in target
    )
    with MariaDb(lab_directory / "compose") as db:
        db.run("CREATE DATABASE contentfilter; CREATE USER mysql@localhost IDENTIFIED VIA unix_socket;", "")
        db.run(
            "CREATE USER contentfilter@'%' IDENTIFIED BY 'secret'; GRANT ALL ON contentfilter.* TO contentfilter@'%'",
            "",
        )
        for _, script in scripts:
            db.run(script.read_text(), "contentfilter")
        db.run("INSERT INTO clamavclients (address) VALUES ('@example.com')", "contentfilter")
        grants = db.run("SHOW GRANTS FOR contentfilter@'%'", "").splitlines()
        assert sorted(re.findall(r"GRANT (.*) TO", "\n".join(grants))) == [
            "SELECT ON `contentfilter`.`clamavclients`",
            "SELECT ON `contentfilter`.`spamdclients`",
            "USAGE ON *.*",
        ]
        (tmp_path / "secret").write_text("secret\n")
        (tmp_path / "secret").chmod(0o600)
        text = SETTINGS.read_text().replace('host = "mariadb"', f'host = "127.0.0.1"\nport = {db.port}')
        text = text.replace("/run/secrets/mariadb_password", str(tmp_path / "secret"))
        config = tmp_path / "contentfilter.toml"
        config.write_text(text)
        words = (
            "-m",
            "contentfilter",
            "--config",
            config,
            "check",
            "--json",
            "--queue-conf",
            ROOT / "etc" / "queue.conf",
        )
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert report["errors"] == []
    assert report["counts"]["clamavclients rows"] == 1
    assert done.returncode == 0


def test_the_document_names_the_uid_and_the_directories_that_must_be_made() -> None:
    uid = only(stages(ROOT / "Dockerfile")["image"], "USER").partition(":")[0]
    text = (ROOT / "docs" / "container.md").read_text()
    assert f"install -d -o {uid} -g {uid} -m 755 {Settings().service.run}" in text
    for secret in COMPOSE["secrets"]:
        assert secret in text
