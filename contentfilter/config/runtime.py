"""The configuration as one value: all that a worker needs, made from settings and control files."""

import dataclasses
import os

import msgspec

from contentfilter.config.controls import Controls
from contentfilter.config.keys import load_keys
from contentfilter.errors import ConfigError, Problem
from contentfilter.policy.plan import Switches
from contentfilter.scanners.signatures.engine import (
    Rules,
    default_loadertypes,
    default_signatures,
    parse_loadertypes,
    parse_signatures,
)
from contentfilter.scanners.tls import tls_for
from contentfilter.settings import Settings


class Runtime(msgspec.Struct, frozen=True):
    """The configuration of a worker."""

    settings: Settings
    switches: Switches
    spamdchildren: int
    signatures: Rules | None  # None where the switch is off
    loadertypes: Rules | None
    snapshot: str  # empty: there are no tables yet
    smtplog: int = 0
    sysfacility: str = ""


def unusable(settings: Settings) -> tuple[Problem, ...]:
    """Problems of the certificates and keys that the settings name."""
    found: list[Problem] = []
    for load in (lambda: tls_for(settings.spamd), lambda: load_keys(settings.events)):
        try:
            load()
        except ConfigError as error:
            found += error.problems
        except ValueError:
            pass  # the settings' own check has reported it
    return tuple(found)


def make_runtime(settings: Settings, controls: Controls, snapshot: str) -> tuple[Runtime, tuple[Problem, ...]]:
    """Settings and control files as one value, and what is wrong in the signature lists."""
    switches = Switches(**{f.name: controls.values[f.name] for f in dataclasses.fields(Switches)})
    problems: list[Problem] = []

    def rules(text: bytes | None, name: str) -> Rules:
        if text is None:
            return default_signatures() if name == "badsignatures" else default_loadertypes()
        parse = parse_signatures if name == "badsignatures" else parse_loadertypes
        found, wrong = parse(text, os.path.join(settings.service.control, name), settings.signatures.mode)
        problems.extend(wrong)
        return found

    signatures, loadertypes = (
        rules(controls.badsignatures, "badsignatures"),
        rules(controls.badloadertypes, "badloadertypes"),
    )
    runtime = Runtime(
        settings,
        switches,
        controls.values["spamdchildren"],
        signatures if switches.chksignature else None,
        loadertypes if switches.chkloadertype else None,
        snapshot,
        controls.values["smtplog"],
        controls.values["sysfacility"],
    )
    return runtime, tuple(problems)


def worker_count(settings: Settings) -> int:
    return settings.service.workers or len(os.sched_getaffinity(0))
