"""Migration from H-Sphere: options, the files named after parameters, recipient tables, signature lists.

Facts and their sources: domain-spec parts 2 and 6. The syntax of control/options and the format of the tables were
never published. The syntax accepted here (``name value``, ``name=value``, ``name: value``; a parameter's own file
overrides options; in options the last line counts) is an assumption, and the report says so where it matters.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

from contentfilter.admin.migration import (
    CONTROL,
    NAMES,
    ChangeKind,
    Migration,
    MigrationReport,
    NewFile,
    TableRow,
    name_files,
    numbered,
    options_file,
    queue_file,
    settings_file,
    table_file,
    table_key,
)
from contentfilter.model import readable

TABLES = ("clamavclients", "spamdclients")
# new name -> (old names, letters of a pattern that H-Sphere looks at)
LISTS = {"badsignatures": (("badsignatures", "badmimetypes"), 9), "badloadertypes": (("badloadertypes",), 5)}
_COMPILED = (".cdb", ".db", ".db3")

# name -> (pattern of a value, the same in words, difference in meaning; empty if there is none)
_NUMBER, _SWITCH, _SKIP = r"[0-9]{1,12}", r"[01]", r"[012]"
_WHO = "clients are recognised by the environment of qmail-smtpd: see [origin] in contentfilter.toml"
_NETWORK = "network tests are an option of spamd: start it without --local for 1, with --local for 0"
_CHILDREN = "maximum number of simultaneous requests to spamd; start spamd itself with the same --max-children"
_BETTER = 'also detects what H-Sphere misses; [signatures] mode = "compatible" scans line by line, as before'
PARAMETERS: dict[str, tuple[str, str, str]] = {
    "clamglobal": (_SWITCH, "0 or 1", ""),
    "spamglobal": (_SWITCH, "0 or 1", ""),
    "skipcachk": (_SKIP, "0, 1 or 2", _WHO),
    "skipsachk": (_SKIP, "0, 1 or 2", _WHO),
    "samsgsize": (_NUMBER, "bytes", ""),
    "sanetcheck": (_SWITCH, "0 or 1", _NETWORK),
    "spamdchildren": (r"[0-9]{1,4}", "a number below 10000", _CHILDREN),
    "chksignature": (_SWITCH, "0 or 1", _BETTER),
    "chkloadertype": (_SWITCH, "0 or 1", _BETTER),
    "xoriginatingip": (_SWITCH, "0 or 1", ""),
    "xenveloptoheader": (
        _SWITCH,
        "0 or 1",
        "only in mail for a single recipient, so that it does not reveal Bcc",
    ),
    "databytes": (_NUMBER, "bytes", ""),
    "maxrecipients": (_NUMBER, "a number", ""),
    "smtplog": (
        _SKIP,
        "0, 1 or 2",
        "only lines of the content filter; qmail-smtpd logs the SMTP session",
    ),
    "sysfacility": (r"LOG_LOCAL[0-7]", "LOG_LOCAL0 to LOG_LOCAL7", ""),
}
_EXPIRED = frozenset(("badurls", "urlscnt"))
_QMAIL = """
badmailfrom badmailpatterns badmailfrom-unknown badhelo badrcptto badrcptpatterns blackholedsender quitasap mfdnscheck
nomfdnscheck helodnscheck splithorizon stricthelocheck noathost stripsinglequotes lowercase userchk catchall localtime
rejectdiscardedmail uquotacheck rcptdnschecks maxwrongrcpt tarpitcount tarpitdelay smdcheck authsender relayclients
relaydomains relaymailfrom smtpauth popbeforesmtp opensmtptimeout tcpsessioncount periplimit timeoutsmtpd newline
rblhosts flagfailclosed flagrblbounce qmailspp smtpplugins spfbehavior spfrules spfguess spfexp mconnectext rblsyslog
concurrencyremote concurrencylocal queuelifetime bouncefrom bouncehost doublebouncehost doublebounceto bouncesubject
doublebouncesubject bouncemessage doublebouncemessage strictbounce temperror bouncingip patterns_policy autoreply_policy
sms maxbouncebytes
"""
QMAIL = frozenset(_QMAIL.split())  # H-Sphere's other parameters: qmail-smtpd's, qmail-send's and so on (6.2 to 6.5)
READS = ("options", *TABLES, *(old for names, _ in LISTS.values() for old in names), *PARAMETERS, *NAMES)


def migrate(old: Mapping[str, bytes], others: Collection[str] = ()) -> Migration:
    """Convert the files in ``old`` (name → content). ``others``: names of files that were not read."""
    report = MigrationReport()
    if not old.keys() - set(NAMES):
        report.check("options", 0, "not here", "no control file of H-Sphere; specify the control directory of qmail")
        return Migration((), report.differences())
    options = _options(old, report)
    files = []
    for name in TABLES:
        rows = _table(name, old[name], report) if name in old else []
        everybody = options.get("clamglobal" if name == "clamavclients" else "spamglobal") == "1"
        if not rows and not everybody:
            compiled = [other for other in others if other.startswith(name) and other.endswith(_COMPILED)]
            text = f"{compiled[0]} is compiled; provide its source" if compiled else "see also the users directory"
            report.check(name, 0, "no rows", f"no mail would be checked; {text}")
        files.append(table_file(name, "hsphere", rows))
    files += [options_file("hsphere", options), settings_file("hsphere", {"service": {"control": CONTROL}})]
    files.append(
        queue_file("hsphere", ("# Nothing to set: `contentfilter hook install` finds and keeps the real qmail-queue.",))
    )
    for name, (names, letters) in LISTS.items():
        found = [(n, old[n]) for n in names if n in old]
        if found:
            files.append(_list(name, found, letters, report))
    files += name_files(old, report)
    _general(others, report)
    return Migration(tuple(files), report.differences())


def _options(old: Mapping[str, bytes], report: MigrationReport) -> dict[str, str]:
    """Parameters of the content filter and their values; an invalid one is skipped, so that its default applies."""
    taken: dict[str, tuple[str, int, bytes]] = {}
    for number, line in _lines("options", old.get("options", b""), report):
        match = re.match(rb"([A-Za-z0-9_./-]+)([ \t]*[ \t=:][ \t]*(.*))?$", line, re.DOTALL)
        if not match:
            report.check("options", number, line, "not a name with a value; skipped")
            continue
        name, value = match[1].decode("ascii").lower(), match[3] or b""
        if name not in PARAMETERS:
            _other("options", number, name, line, report)
            continue
        if name in taken:
            kind = ChangeKind.CHANGED if taken[name][2] == value else ChangeKind.CHECK
            report.add(kind, "options", taken[name][1], name, f"given again in line {number}; the last line is used")
        taken[name] = "options", number, value
    for name in PARAMETERS.keys() & old.keys():
        first, _, more = old[name].partition(b"\n")
        value = first.rstrip(b" \t\r")
        if name in taken and taken[name][2] != value:
            why = f"the file control/{name} has another value and is used; which one H-Sphere uses was never published"
            report.check("options", taken[name][1], name, why)
        if more.strip():
            report.changed(name, 2, more, "only the first line is used")
        taken[name] = name, 1, value
    written = {}
    for name in PARAMETERS:  # in a fixed order, regardless of the lines
        if name not in taken:
            continue
        path, line_number, value = taken[name]
        shape, words, different = PARAMETERS[name]
        text, subject = readable(value), f"{name} {readable(value)}"
        if not re.fullmatch(shape, text):
            report.check(path, line_number, subject, f"the value has to be {words}; skipped, the default applies")
            continue
        written[name] = text
        kind = ChangeKind.CHANGED if different and text != "0" else ChangeKind.SAME
        kind = ChangeKind.CHECK if name == "sanetcheck" else kind
        report.add(kind, path, line_number, subject, different if kind is not ChangeKind.SAME else "in control/options")
    return written


def _lines(path: str, text: bytes, report: MigrationReport) -> Iterator[tuple[int, bytes]]:
    """Lines without comments, empty lines, and blanks at both ends."""
    odd = False
    for number, raw in numbered(text):
        line = raw.strip(b" \t\r")
        if not line or line.startswith(b"#"):
            continue
        odd = odd or raw.endswith(b"\r")
        if raw[:1] in b" \t":
            report.changed(
                path, number, raw, "leading blanks are removed; qmail keeps them in lists, where they prevent a match"
            )
        yield number, line
    if odd:
        report.changed(path, 0, "CR LF", "DOS line ends; the CR is removed")


def _other(path: str, line: int, name: str, subject: bytes, report: MigrationReport) -> None:
    """Report a name in options that is not a parameter of the content filter."""
    if name in _EXPIRED:
        report.left(path, line, subject, "H-Sphere removed it in 2.5 patch 10; the service no longer exists")
    elif name in QMAIL:
        report.left(path, line, subject, "belongs to H-Sphere's qmail and still applies there; not read here")
    else:
        near = difflib.get_close_matches(name[:40], (*PARAMETERS, *QMAIL), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        report.check(path, line, subject, f"not a parameter of H-Sphere's{hint}; skipped")


def _table(name: str, text: bytes, report: MigrationReport) -> list[TableRow]:
    """Rows of clamavclients or spamdclients that our tables can represent."""
    rows: dict[bytes, tuple[int, TableRow]] = {}
    for number, line in _lines(name, text, report):
        exempt = line.startswith(b"!")
        key = table_key(line.removeprefix(b"!").lstrip(b" \t"))
        if key is None:
            why = "neither an address nor a domain, or a pattern without an equivalent; skipped"
            report.check(name, number, line, why)
            continue
        if key in rows:
            earlier, before = rows[key]
            if before.exempt != exempt:
                why = f"contradicts line {earlier}; the later line is used"
                report.check(name, number, line, why)
        rows[key] = number, TableRow(key, exempt)
        if exempt:
            why = "exempts here; in some lists of H-Sphere, ! includes instead"
            report.check(name, number, line, why)
        elif b"*" in line and key != line.lower():
            report.changed(name, number, line, f"the pattern is converted to {readable(key)}")
    report.same(name, 0, f"{len(rows)} keys", f"in control/{name}")
    return [row for _, row in rows.values()]


def _list(name: str, sources: list[tuple[str, bytes]], letters: int, report: MigrationReport) -> NewFile:
    """badsignatures or badloadertypes: the patterns, truncated as by H-Sphere's compiler."""
    patterns: dict[bytes, None] = {}
    for path, text in sources:
        if path != name:
            report.changed(path, 0, path, f"name used by SPAMCONTROL; written as control/{name}")
        for number, line in _lines(path, text, report):
            pattern = line[:letters]
            if len(pattern) < letters or not re.fullmatch(rb"[A-Za-z0-9+/]+", pattern):
                why = f"not {letters} base64 letters, so it never matched; skipped"
                report.check(path, number, line, why)
                continue
            if len(line) > letters:
                report.changed(path, number, line, f"only the first {letters} letters are used, as before")
            patterns[pattern] = None
        if text and not text.endswith(b"\n"):
            why = "without a line end, H-Sphere's compiler loses the last line; it is used here"
            report.changed(path, text.count(b"\n") + 1, "last line", why)
    report.same(sources[0][0], 0, f"{len(patterns)} patterns", f"in control/{name}")
    body = b"".join(pattern + b"\n" for pattern in patterns)
    return NewFile(
        f"control/{name}", b"# Written by contentfilter migrate from hsphere.\n" + body, f"goes to {CONTROL}/{name}"
    )


def _general(others: Collection[str], report: MigrationReport) -> None:
    """Differences that apply to every H-Sphere, and files that were ignored."""
    report.changed("-", 0, "virus found",
        "clamdmail removes the mail and writes a notice; here it is refused in the SMTP session. To restore that, set "
        '[clamd] action = "remove"',
    )  # fmt: skip
    report.changed("-", 0, "users' choices",
        "Remove, Mark and Move, levels and MaxScore are in the panel's database, not in these files; docs/migration.md "
        "describes how to write them as options in the tables",
    )  # fmt: skip
    report.changed("-", 0, "a scanner is down",
        "not documented by H-Sphere; here mail is deferred without clamd and passes unchecked without spamd: [failure]",
    )  # fmt: skip
    report.changed("-", 0, "qmail-queue",
        "the one of H-Sphere reads its own tables and starts clamdmail; empty the old tables, or mail is checked twice",
    )  # fmt: skip
    for other in sorted(others):
        known = other in QMAIL or other in _EXPIRED
        what = "belongs to H-Sphere's qmail and still applies there" if known else "not a file of the content filter"
        report.left(".", 0, other, f"{what}; not read")
