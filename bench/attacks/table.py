"""Table of the attacks: who acts, how the daemon is set up for it, and how the daemon must show it."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks import fuse, local_users, machine, others, peers, senders
from attacks.kit import Act, Place

NOBODY = 65534
ROOT = 0
REFUSED = ("refused_connections_total",)
TAKEN = (*REFUSED, "garbage_total", "bad_messages_total", "hooks_gone_total")


@dataclass(frozen=True, slots=True)
class Attack:
    """One row. ``act`` runs until it is killed; its docstring says who does what."""

    act: Act
    uid: int = NOBODY
    gid: int = NOBODY
    prepare: Callable[[Place], None] | None = None  # as root, in the attacker's process, before it changes its user
    undo: Callable[[Place], None] | None = None  # as root, after the attacker was killed
    check: Callable[[Place], str] | None = None  # a problem that only this attack may cause, or ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()  # "clamd", "spamd", "mariadb": hostile ones; "feed", "small disk", "hang"
    protected: bool = True  # half of the honest mail needs clamd
    named: bool = False  # `status` must name NOBODY
    metrics: tuple[str, ...] = ()  # one of them must grow
    recorded_only: bool = False  # measured, and not judged: another issue's, or no attack

    @property
    def kind(self) -> str:
        return " ".join((self.act.__doc__ or "").split())


def _at_queue(act: Act, **more: Any) -> Attack:
    return Attack(act, **{"named": True, "metrics": TAKEN} | more)


def _as_group(act: Act, **more: Any) -> Attack:
    return Attack(act, gid=os.getgid(), **more)


def _as_root(act: Act, **more: Any) -> Attack:
    return Attack(act, uid=ROOT, gid=ROOT, **more)


def _against_clamd(act: Act, **more: Any) -> Attack:
    return _as_root(_Beside(act, senders.victims, act), needs=frozenset({"clamd"}), protected=False, **more)


def _against_spamd(act: Act, **more: Any) -> Attack:
    return _as_root(_Beside(act, senders.victims, act), needs=frozenset({"spamd"}), protected=False, **more)


class _Beside:
    """``server`` in a process of its own, and ``act`` at the same time; the attack has the name of ``named``."""

    def __init__(self, server: Act, act: Act, named: Act) -> None:
        self._server, self._act, self.named = server, act, named
        self.__doc__ = named.__doc__

    def __call__(self, place: Place) -> None:
        if not os.fork():
            self._server(place)
        self._act(place)


def _mails_with_spamd(mails: Act, **more: Any) -> Attack:
    """Hostile mail that a spamd calls spam."""
    return _as_root(
        _Beside(peers.all_spam, mails, mails),
        needs=frozenset({"spamd"}),
        settings={"spamd": {"subject_tag": "[SPAM] "}},
        **more,
    )


def _name_database(place: Place) -> None:
    """Begin to name the database in the configuration, and reload it again and again."""
    path = Path(place.config)
    path.write_text(path.read_text().replace('source = "files"', 'source = "mariadb"'))
    while True:
        os.kill(place.daemon, signal.SIGHUP)
        time.sleep(2.0)


def _database(server: Act) -> Attack:
    needs = frozenset({"mariadb"})
    return _as_root(
        _Beside(server, _name_database, server), needs=needs, check=peers.password_taken, metrics=("loads_total",)
    )


def _by_name(*attacks: Attack) -> dict[str, Attack]:
    return {_name(attack): attack for attack in attacks}


def _name(attack: Attack) -> str:
    inner = getattr(attack.act, "named", attack.act)
    return str(inner.__name__).replace("_", "-")


ATTACKS: Mapping[str, Attack] = _by_name(
    _at_queue(local_users.linger_request),
    _at_queue(local_users.linger_nested),
    _at_queue(local_users.linger_garbage),
    _at_queue(local_users.linger_surplus),
    _at_queue(local_users.linger_threads),
    _at_queue(local_users.linger_unread),
    _at_queue(local_users.fifo),
    _at_queue(local_users.terminals),
    _at_queue(local_users.proc_files),
    _at_queue(local_users.odd_descriptors),
    _at_queue(local_users.sparse),
    _at_queue(local_users.truncated),
    _at_queue(local_users.leases),
    _at_queue(local_users.hanging_file_system, prepare=fuse.mount, undo=fuse.unmount),
    _at_queue(local_users.nesting),
    _at_queue(local_users.half_packets),
    _at_queue(local_users.slow_packets),
    _at_queue(local_users.surplus_descriptors),
    _at_queue(local_users.no_report),
    _at_queue(local_users.unread_answers),
    _at_queue(local_users.huge_envelopes),
    _at_queue(local_users.idle),
    _at_queue(local_users.flood),
    _at_queue(local_users.mail_flood),
    Attack(local_users.many_users, uid=ROOT, gid=ROOT, metrics=TAKEN),
    _at_queue(local_users.many_processes),
    _at_queue(local_users.killed_hooks, named=False),
    _at_queue(local_users.short_budgets),
    _at_queue(local_users.half_closed),
    _at_queue(local_users.out_of_band),
    Attack(local_users.processor, recorded_only=True),
    Attack(others.http_spaces),
    Attack(others.http_slow),
    Attack(others.http_flood),
    _as_group(others.control_bomb, metrics=("frames_malformed_total",)),
    _as_group(others.control_slow),
    _as_group(others.events_multipart),
    _as_group(others.events_large),
    _as_group(others.events_subscriptions),
    _as_root(others.workers_multipart),
    _as_root(others.workers_noise, metrics=("frames_malformed_total",)),
    Attack(others.collector_subscriptions, needs=frozenset({"feed"})),
    Attack(others.collector_flood, needs=frozenset({"feed"})),
    _against_clamd(peers.clamd_writes, check=senders.victims_changed),
    _against_clamd(peers.clamd_endless, metrics=("scans_total",)),
    _against_spamd(peers.spamd_head, metrics=("scans_total",)),
    _against_spamd(peers.spamd_endless, metrics=("scans_total",)),
    _database(peers.mariadb_endless),
    _database(peers.mariadb_rows),
    _database(peers.mariadb_password),
    _mails_with_spamd(senders.charsets),
    _mails_with_spamd(senders.long_subject),
    _mails_with_spamd(senders.long_header),
    _as_root(senders.many_recipients),
    _as_root(senders.many_differing_recipients),
    _as_root(senders.costly_mime),
    _as_root(senders.deep_mime, recorded_only=True),
    _as_root(senders.large_mail),
    _as_root(machine.hung_disk, undo=machine.disk_works, needs=frozenset({"hang"})),
    _as_root(machine.full_disk, undo=machine.disk_has_room, needs=frozenset({"small disk"})),
    _as_root(machine.hung_control, undo=machine.control_works),
    _as_root(machine.stopped_clamd, undo=machine.clamd_goes_on, protected=False, metrics=("scans_total",)),
    _as_root(machine.reload_storm, metrics=("loads_total",)),
    _as_root(machine.reloads_of_large_mail, metrics=("loads_total",)),
    _as_root(machine.order_storm),
)
