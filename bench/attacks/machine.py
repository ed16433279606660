"""Trouble of the machine and its administrator: disks, control files, scanners and orders. Run as root."""

import os
import signal
import subprocess
import sys
import time

from lab.clamd import EICAR

from attacks.kit import Place
from attacks.senders import submit

HANG = "hang"  # file in the scratch directory, for tests/lab/refuse.c


def hung_disk(place: Place) -> None:
    """State disk: every call that writes hangs, while mail that must be quarantined arrives, six at a time and more."""
    with open(f"{place.scratch}/{HANG}", "w") as order:
        order.write("hang")
    submit(place, lambda n: b"Subject: q%d\n\n%b" % (n, EICAR), (b"kept@mixed.example",))


def disk_works(place: Place) -> None:
    os.unlink(f"{place.scratch}/{HANG}")


def hung_control(place: Place) -> None:
    """Control directory: a FIFO in place of a control file, so that reading it blocks, and reloads meanwhile."""
    path = f"{place.control}/clamavclients"
    os.rename(path, path + ".before")
    os.mkfifo(path)
    while True:
        os.kill(place.daemon, signal.SIGHUP)
        time.sleep(1.0)


def control_works(place: Place) -> None:
    path = f"{place.control}/clamavclients"
    os.unlink(path)
    os.rename(path + ".before", path)
    os.kill(place.daemon, signal.SIGHUP)


def full_disk(place: Place) -> None:
    """State disk: not one byte more fits, while mail that must be quarantined arrives."""
    with open(f"{place.state}/filling", "wb", buffering=0) as filling:
        for size in (65_536, 4096, 1):
            try:
                while True:
                    filling.write(b"x" * size)
            except OSError:
                pass
    submit(place, lambda n: b"Subject: q%d\n\n%b" % (n, EICAR), (b"kept@mixed.example",))


def disk_has_room(place: Place) -> None:
    os.unlink(f"{place.state}/filling")


def stopped_clamd(place: Place) -> None:
    """clamd: stopped (SIGSTOP), while mail for protected recipients arrives."""
    os.kill(place.clamd, signal.SIGSTOP)
    submit(place, lambda n: b"Subject: %d\n\nx\n" % n)


def clamd_goes_on(place: Place) -> None:
    os.kill(place.clamd, signal.SIGCONT)


def reload_storm(place: Place) -> None:
    """Administrator: reloads as fast as they can be asked for, each with changed tables."""
    path = f"{place.control}/clamavclients"
    with open(path) as file:
        before = file.read()
    number = 0
    while True:
        number += 1
        with open(path + ".new", "w") as made:
            made.write(before + f"user{number}@storm.example\n")
        os.rename(path + ".new", path)
        os.kill(place.daemon, signal.SIGHUP)
        time.sleep(0.02)


def reloads_of_large_mail(place: Place) -> None:
    """Administrator: reloads, while messages of 2 MB are being opened."""
    if not os.fork():
        reload_storm(place)
    body = b"Subject: two\n\n" + b"A line of a large message that is not compressed.\n" * 40_000
    submit(place, lambda n: body, (b"none@mixed.example",))


def order_storm(place: Place) -> None:
    """Administrator: orders on the command line (bypass, allow, status) as fast as it can be run."""
    orders = (
        ["allow", "add", "Lab.Nothing", "--for", "1h", "--reason", "test"],
        ["allow", "remove", "Lab.Nothing"],
        ["status"],
        ["quarantine", "list"],
        ["why", "--limit", "5"],
    )
    while True:
        for order in orders:
            words = [sys.executable, "-P", "-m", "contentfilter", "--config", place.config, *order]
            subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
