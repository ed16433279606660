"""Attacks of a local user at the hook's socket. The first words of each docstring name the party, the rest the kind."""

import fcntl
import os
import pty
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from lab.clamd import EICAR
from lab.descriptors import lingering

from attacks.kit import (
    ENVELOPE,
    MESSAGE,
    PAUSE,
    Held,
    Place,
    abandon,
    connect,
    file,
    forever,
    nested,
    offer,
    reap,
    request,
    send,
    spawn_hook,
)

SPLIT = b"Fa@b.example\0Tmarked@mixed.example\0Tnone@mixed.example\0\0"
STEP = 0.02  # seconds between two descriptors that are laborious to make


def _linger(place: Place, packet: bytes, wrap: Callable[[int], int], *, surplus: bool = False) -> None:
    held = Held(4000)

    def once() -> None:
        bad, peer = lingering()
        held.add(peer)
        given = wrap(bad.fileno())
        envelope = file()
        try:
            connection = connect(place.queue)
            held.add(connection)
            send(connection, packet, *((envelope, envelope, given) if surplus else (given, envelope)))
        finally:
            os.close(envelope)
            abandon(*{given, bad.detach()})

    forever(once, STEP)


def _as_it_is(fd: int) -> int:
    return fd


def linger_request(place: Place) -> None:
    """Local user: a TCP socket with SO_LINGER and a full send queue in place of the message; its close() blocks."""
    _linger(place, request(), _as_it_is)


def linger_nested(place: Place) -> None:
    """Local user: the same, in the queue of a socket that is passed, so that the daemon's close() is the last one."""
    _linger(place, request(), nested)


def linger_garbage(place: Place) -> None:
    """Local user: the same, with a packet that is no request, so that it is closed unread."""
    _linger(place, b"garbage", nested)


def linger_surplus(place: Place) -> None:
    """Local user: the same as a surplus descriptor, which the kernel itself closes in recvmsg()."""
    _linger(place, request(), nested, surplus=True)


def linger_threads(place: Place) -> None:
    """Local user: the same with 2 MiB announced, so that it is opened, and closed, in a thread."""
    _linger(place, request(2 << 20), nested)


def linger_unread(place: Place) -> None:
    """Local user: a sound request, then packets with such sockets that stay unread: closing the connection blocks."""
    held = Held(2000)

    def once() -> None:
        connection = offer(place, MESSAGE)
        bad, peer = lingering()
        held.add(peer)
        given = nested(bad.fileno())
        try:
            send(connection, b"x", given)
        finally:
            abandon(given, bad.detach(), connection.detach())

    forever(once, STEP)


def _offer_each(place: Place, make: Sequence[Callable[[], int]], sizes: Sequence[int] = (18, 0, 1 << 20)) -> None:
    """Every kind of descriptor as message and as envelope, with several announced sizes."""
    held = Held(400)

    def once() -> None:
        for each in make:
            for size in sizes:
                for swap in (False, True):
                    bad, good = each(), file(MESSAGE if swap else ENVELOPE)
                    try:
                        connection = connect(place.queue)
                        held.add(connection)
                        packet = request(len(MESSAGE), size) if swap else request(size)
                        send(connection, packet, *((good, bad) if swap else (bad, good)))
                    finally:
                        os.close(bad)
                        os.close(good)

    forever(once, PAUSE)


def _opener(path: str, flags: int) -> Callable[[], int]:
    return lambda: os.open(path, flags)


def fifo(place: Place) -> None:
    """Local user: FIFOs and pipes, full, empty and closed at the other end, in place of files."""
    path = f"{place.scratch}/fifo{os.getpid()}"
    os.mkfifo(path)
    ends = os.pipe()
    full = os.pipe()
    os.set_blocking(full[1], False)
    try:
        while True:
            os.write(full[1], b"x" * 4096)
    except BlockingIOError:
        pass
    _offer_each(place, [_opener(path, os.O_RDWR), *[lambda fd=fd: os.dup(fd) for fd in (*ends, *full)]])


def terminals(place: Place) -> None:
    """Local user: both sides of a pseudo-terminal, whose reads block, in place of files."""
    one, other = pty.openpty()
    _offer_each(place, [lambda: os.dup(one), lambda: os.dup(other)])


def proc_files(place: Place) -> None:
    """Local user: files of /proc and /dev, whose size is a lie and whose content has no end."""
    names = ("/proc/self/pagemap", "/proc/self/mem", "/proc/self/maps", "/proc/self/environ", "/proc/self/stat")
    names = (*names, "/dev/zero", "/dev/urandom", "/dev/full", "/sys/kernel/uevent_seqnum")
    _offer_each(place, [_opener(name, os.O_RDONLY) for name in names if os.access(name, os.R_OK)])


def odd_descriptors(place: Place) -> None:
    """Local user: O_PATH, write-only, directories, eventfd, timerfd, epoll, pidfd, sockets in place of files."""
    watched = select.epoll()
    makers: list[Callable[[], int]] = [
        _opener("/etc/passwd", os.O_PATH),
        _opener("/", os.O_RDONLY),
        _opener("/dev/null", os.O_WRONLY),
        lambda: os.eventfd(0),
        lambda: os.pidfd_open(os.getpid()),
        lambda: os.dup(watched.fileno()),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        lambda: connect(place.queue).detach(),
        lambda: os.memfd_create("sealed, empty", os.MFD_ALLOW_SEALING),
    ]
    _offer_each(place, makers)


def sparse(place: Place) -> None:
    """Local user: files of a terabyte that hold nothing, announced as they are, or as small."""
    _offer_each(place, [lambda: file(b"", 1 << 40), lambda: file(b"", 900 << 20)], (1 << 40, 900 << 20, 18))


def truncated(place: Place) -> None:
    """Local user: files that are truncated, and written, while they are read and mapped (SIGBUS)."""
    size = 8 << 20
    shared = file(b"Subject: x\n\n" + b"y" * (size - 12))

    def change() -> None:
        while True:
            os.ftruncate(shared, 0)
            os.ftruncate(shared, size)
            os.pwrite(shared, b"z" * 4096, 0)

    threading.Thread(target=change, daemon=True).start()
    envelope, held = file(), Held(64)

    def once() -> None:
        connection = connect(place.queue)
        held.add(connection)
        send(connection, request(size), shared, envelope)

    forever(once, 0.01)


def leases(place: Place) -> None:
    """Local user: files with a write lease, whose opening by another process blocks for 45 seconds."""
    path = f"{place.scratch}/lease{os.getpid()}"
    with open(path, "wb") as made:
        made.write(MESSAGE)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # the lease is never given up
    leased = os.open(path, os.O_RDWR)
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    _offer_each(place, [lambda: os.dup(leased)], (len(MESSAGE),))


def hanging_file_system(place: Place) -> None:
    """Local user: files of a FUSE file system that never answers a read, a getattr, or the flush in close()."""
    bad = [os.open(f"{place.scratch}/fuse/{name}", os.O_RDONLY) for name in ("read", "getattr", "flush")]
    envelope, held = file(), Held(400)  # our copies stay open: our own close() would hang, too

    def once() -> None:
        for fd in bad:
            connection = connect(place.queue)
            held.add(connection)
            send(connection, request(), fd, envelope)

    forever(once, PAUSE)


def nesting(place: Place) -> None:
    """Local user: sockets in the queues of sockets, eight deep and in cycles, which only the kernel can collect."""
    envelope, held = file(), Held(200)

    def once() -> None:
        inner = file(MESSAGE)
        for _ in range(3):  # deeper: the kernel refuses it (ETOOMANYREFS)
            outer = nested(inner, inner, inner)
            os.close(inner)
            inner = outer
        one, other = socket.socketpair()
        send(one, b".", one.fileno(), other.fileno(), inner)  # a cycle
        connection = connect(place.queue)
        held.add(connection)
        try:
            send(connection, request(), one.fileno(), envelope)
        finally:
            os.close(inner)
            one.close()
            other.close()

    forever(once)


def half_packets(place: Place) -> None:
    """Local user: requests cut anywhere, with wrong lengths, with nothing, with too much, with a second one behind."""
    chance, whole, held = random.Random(1), request(environ={b"TCPREMOTEIP": b"192.0.2.1"}), Held(300)
    message, envelope = file(MESSAGE), file()

    def once() -> None:
        packet = bytearray(whole[: chance.randrange(1, len(whole))] if chance.random() < 0.5 else whole)
        if chance.random() < 0.5:
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        packet += b"\0" * chance.choice((0, 0, 1, 40_000))
        connection = connect(place.queue)
        held.add(connection)
        send(connection, bytes(packet), *(message, envelope)[: chance.randrange(3)])
        send(connection, whole, message, envelope)

    forever(once)


def slow_packets(place: Place) -> None:
    """Local user: connections whose request comes in the last moment in which it may come."""
    message, envelope = file(MESSAGE), file()
    waiting: list[tuple[float, socket.socket]] = []

    def once() -> None:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            connection = waiting.pop(0)[1]
            with connection:
                send(connection, request(), message, envelope)
        waiting.append((now + 4.8, connect(place.queue)))

    forever(once, 0.005)


def surplus_descriptors(place: Place) -> None:
    """Local user: 253 descriptors in each packet, the most that the kernel passes."""
    held, some = Held(500), [file() for _ in range(253)]

    def once() -> None:
        connection = connect(place.queue)
        held.add(connection)
        for _ in range(3):
            send(connection, request(), *some)

    forever(once)


def no_report(place: Place) -> None:
    """Local user: 3,600 split messages whose report never comes, with a budget of an hour and more."""
    held = Held(3600)
    forever(lambda: held.add(offer(place, EICAR, SPLIT, 4_000_000.0)))


def unread_answers(place: Place) -> None:
    """Local user: messages whose answer is long and never read."""
    held = Held(3600)
    many = b"Fa@b.example\0" + b"".join(b"Tnone%d@mixed.example\0" % n for n in range(3000)) + b"\0"
    forever(lambda: held.add(offer(place, EICAR, many[:-1] + b"Tmarked@mixed.example\0\0")))


def huge_envelopes(place: Place) -> None:
    """Local user: envelopes of 127 MiB that are nothing but empty recipients, again and again."""
    block = b"Fa@b\0" + b"T\0" * ((127 << 20) // 2 - 4) + b"\0"
    message, envelope, held = file(MESSAGE), file(block), Held(32)

    def once() -> None:
        connection = connect(place.queue)
        held.add(connection)
        send(connection, request(len(MESSAGE), len(block)), message, envelope)

    forever(once, 0.1)


def idle(place: Place) -> None:
    """Local user: as many connections as possible that say nothing."""
    held = Held(20_000)
    forever(lambda: held.add(connect(place.queue)))


def flood(place: Place) -> None:
    """Local user: connections as fast as one process can make them, each closed immediately."""
    forever(lambda: connect(place.queue).close())


def mail_flood(place: Place) -> None:
    """Local user: sound messages as fast as one process can offer them, each answer awaited with 200 others."""
    held = Held(200)
    forever(lambda: held.add(offer(place, MESSAGE)))


def many_users(place: Place) -> None:
    """Forty local users together: each with idle connections and lingering descriptors (a hosting machine)."""
    for number in range(40):
        if not os.fork():
            os.setgid(61_000 + number)
            os.setuid(61_000 + number)
            time.sleep(number / 50)
            (idle if number % 2 else linger_nested)(place)
    signal.pause()


def many_processes(place: Place) -> None:
    """Local user: thirty processes that flood the socket together."""
    for _ in range(30):
        if not os.fork():
            flood(place)
    signal.pause()


def killed_hooks(place: Place) -> None:
    """Local user: hooks that are killed at a random moment of their life."""
    chance = random.Random(2)

    def once() -> None:
        pid = spawn_hook(place, EICAR if chance.random() < 0.3 else MESSAGE, SPLIT)
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        reap()

    forever(once)


def short_budgets(place: Place) -> None:
    """Local user: requests with half a second left, or none, or with a time of sending that makes no sense."""
    chance, held = random.Random(3), Held(300)
    message, envelope = file(MESSAGE), file()

    def once() -> None:
        sent = chance.choice((b"0", b"999999999999999", b"-1", b"%d" % (time.monotonic() * 1000)))
        packet = request(budget=chance.choice((0.0, 0.001, 0.5, 4_000_000.0)), environ={b"CONTENTFILTER_SENT": sent})
        connection = connect(place.queue)
        held.add(connection)
        send(connection, packet, message, envelope)

    forever(once)


def half_closed(place: Place) -> None:
    """Local user: connections shut down in one direction, before and after the request."""
    chance, held = random.Random(4), Held(500)
    message, envelope = file(MESSAGE), file()

    def once() -> None:
        connection = connect(place.queue)
        held.add(connection)
        if chance.random() < 0.3:
            connection.shutdown(socket.SHUT_RD)
        if chance.random() < 0.7:
            send(connection, request(), message, envelope)
        connection.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))

    forever(once)


def out_of_band(place: Place) -> None:
    """Local user: forged credentials, timestamps and other ancillary data beside the descriptors."""
    message, envelope, held = file(MESSAGE), file(), Held(300)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=2i", message, envelope))
    own = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("=3i", os.getpid(), os.getuid(), os.getgid()))

    def once() -> None:
        connection = connect(place.queue)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        held.add(connection)
        connection.sendmsg([request()], [own, rights, rights][: 2 + os.getpid() % 2])

    forever(once)


def processor(place: Place) -> None:
    """Local user: two processes that only burn the processor, without a connection; the price of sharing a machine."""
    if not os.fork():
        while True:
            pass
    while True:
        pass
