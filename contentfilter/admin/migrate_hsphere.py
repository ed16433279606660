"""H-Sphere's controls become ours: options, the files named after parameters, recipient tables, signature lists.

Facts and their sources: domain-spec parts 2 and 6. The syntax of control/options and the format of the tables were
never published. The readings here are ours (``name value``, ``name=value``, ``name: value``; a parameter's own file
beats options; in options the last line counts), and the report says so where they matter.
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

# name -> (what a value looks like, in words, what is different; empty where nothing is)
_NUMBER, _SWITCH, _SKIP = r"[0-9]{1,12}", r"[01]", r"[012]"
_WHO = "who is authenticated or relays is read from qmail-smtpd's environment: see [origin] in contentfilter.toml"
_NETWORK = "network tests belong to spamd: start it without --local for 1, with --local for 0"
_CHILDREN = "how many mails go to spamd at once from here; start spamd itself with the same --max-children"
_BETTER = 'also finds what H-Sphere misses; [signatures] mode = "compatible" goes line by line, as it was'
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
    "xenveloptoheader": (_SWITCH, "0 or 1", "only in mail for a single recipient, else it would give away Bcc"),
    "databytes": (_NUMBER, "bytes", ""),
    "maxrecipients": (_NUMBER, "a number", ""),
    "smtplog": (_SKIP, "0, 1 or 2", "our own lines only; the log of the SMTP session stays qmail-smtpd's"),
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
    """Turn the files in ``old`` (name → content) into ours; ``others`` are names that were not read."""
    report = MigrationReport()
    if not old.keys() - set(NAMES):
        report.add(
            ChangeKind.CHECK, "options", 0, "not here", "none of H-Sphere's controls; give qmail's control directory"
        )
        return Migration((), report.differences())
    options = _options(old, report)
    files = []
    for name in TABLES:
        rows = _table(name, old[name], report) if name in old else []
        everybody = options.get("clamglobal" if name == "clamavclients" else "spamglobal") == "1"
        if not rows and not everybody:
            compiled = [other for other in others if other.startswith(name) and other.endswith(_COMPILED)]
            text = f"{compiled[0]} is compiled; give its text" if compiled else "look also in qmail's users directory"
            report.add(ChangeKind.CHECK, name, 0, "no rows", f"nobody would be checked; {text}")
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
    """The content filter's parameters and their values; what is wrong is not written, so its default holds."""
    taken: dict[str, tuple[str, int, bytes]] = {}
    for number, line in _lines("options", old.get("options", b""), report):
        match = re.match(rb"([A-Za-z0-9_./-]+)([ \t]*[ \t=:][ \t]*(.*))?$", line, re.DOTALL)
        if not match:
            report.add(ChangeKind.CHECK, "options", number, line, "not a name with a value; left out")
            continue
        name, value = match[1].decode("ascii").lower(), match[3] or b""
        if name not in PARAMETERS:
            _other("options", number, name, line, report)
            continue
        if name in taken:
            kind = ChangeKind.CHANGED if taken[name][2] == value else ChangeKind.CHECK
            report.add(
                kind, "options", taken[name][1], name, f"given again in line {number}; the last line counts here"
            )
        taken[name] = "options", number, value
    for name in PARAMETERS.keys() & old.keys():
        first, _, more = old[name].partition(b"\n")
        value = first.rstrip(b" \t\r")
        if name in taken and taken[name][2] != value:
            why = f"the file control/{name} says otherwise and counts here; which one wins was never published"
            report.add(ChangeKind.CHECK, "options", taken[name][1], name, why)
        if more.strip():
            report.add(ChangeKind.CHANGED, name, 2, more, "only the first line counts")
        taken[name] = name, 1, value
    written = {}
    for name in PARAMETERS:  # in one order, whatever the order of the lines
        if name not in taken:
            continue
        path, line_number, value = taken[name]
        shape, words, different = PARAMETERS[name]
        text, subject = readable(value), f"{name} {readable(value)}"
        if not re.fullmatch(shape, text):
            report.add(
                ChangeKind.CHECK,
                path,
                line_number,
                subject,
                f"the value has to be {words}; left out, the default holds",
            )
            continue
        written[name] = text
        kind = ChangeKind.CHANGED if different and text != "0" else ChangeKind.SAME
        kind = ChangeKind.CHECK if name == "sanetcheck" else kind
        report.add(kind, path, line_number, subject, different if kind is not ChangeKind.SAME else "in control/options")
    return written


def _lines(path: str, text: bytes, report: MigrationReport) -> Iterator[tuple[int, bytes]]:
    """The lines that say something, without comments and the blanks at both ends."""
    odd = False
    for number, raw in numbered(text):
        line = raw.strip(b" \t\r")
        if not line or line.startswith(b"#"):
            continue
        odd = odd or raw.endswith(b"\r")
        if raw[:1] in b" \t":
            report.add(
                ChangeKind.CHANGED,
                path,
                number,
                raw,
                "blanks in front are cut here; qmail keeps them in lists, where they hinder a match",
            )
        yield number, line
    if odd:
        report.add(ChangeKind.CHANGED, path, 0, "CR LF", "lines end as in DOS; the CR is cut")


def _other(path: str, line: int, name: str, subject: bytes, report: MigrationReport) -> None:
    """A name in options that is not the content filter's."""
    if name in _EXPIRED:
        report.add(
            ChangeKind.LEFT, path, line, subject, "H-Sphere itself took it out in 2.5 patch 10; nobody listens any more"
        )
    elif name in QMAIL:
        report.add(ChangeKind.LEFT, path, line, subject, "belongs to H-Sphere's qmail and goes on there; not read here")
    else:
        near = difflib.get_close_matches(name[:40], (*PARAMETERS, *QMAIL), n=1)
        hint = f"; is {near[0]} meant?" if near else ""
        report.add(ChangeKind.CHECK, path, line, subject, f"not a parameter of H-Sphere's{hint}; left out")


def _table(name: str, text: bytes, report: MigrationReport) -> list[TableRow]:
    """The rows of clamavclients or spamdclients that our tables can hold."""
    rows: dict[bytes, tuple[int, TableRow]] = {}
    for number, line in _lines(name, text, report):
        exempt = line.startswith(b"!")
        key = table_key(line.removeprefix(b"!").lstrip(b" \t"))
        if key is None:
            why = "neither an address nor a domain, or a pattern that has no counterpart here; left out"
            report.add(ChangeKind.CHECK, name, number, line, why)
            continue
        if key in rows:
            earlier, before = rows[key]
            if before.exempt != exempt:
                why = f"says the opposite of line {earlier}; the later line counts"
                report.add(ChangeKind.CHECK, name, number, line, why)
        rows[key] = number, TableRow(key, exempt)
        if exempt:
            why = "exempts here; in some of H-Sphere's lists ! includes instead"
            report.add(ChangeKind.CHECK, name, number, line, why)
        elif b"*" in line and key != line.lower():
            report.add(ChangeKind.CHANGED, name, number, line, f"the pattern is written as {readable(key)}")
    report.add(ChangeKind.SAME, name, 0, f"{len(rows)} keys", f"in control/{name}")
    return [row for _, row in rows.values()]


def _list(name: str, sources: list[tuple[str, bytes]], letters: int, report: MigrationReport) -> NewFile:
    """badsignatures or badloadertypes: the patterns, cut as H-Sphere's compiler cuts them."""
    patterns: dict[bytes, None] = {}
    for path, text in sources:
        if path != name:
            report.add(ChangeKind.CHANGED, path, 0, path, f"SPAMCONTROL's name; written as control/{name}")
        for number, line in _lines(path, text, report):
            pattern = line[:letters]
            if len(pattern) < letters or not re.fullmatch(rb"[A-Za-z0-9+/]+", pattern):
                why = f"not {letters} base64 letters, so it never matched; left out"
                report.add(ChangeKind.CHECK, path, number, line, why)
                continue
            if len(line) > letters:
                report.add(ChangeKind.CHANGED, path, number, line, f"only the first {letters} letters count, as before")
            patterns[pattern] = None
        if text and not text.endswith(b"\n"):
            why = "without a line end H-Sphere's compiler loses the last line; it counts here"
            report.add(ChangeKind.CHANGED, path, text.count(b"\n") + 1, "last line", why)
    report.add(ChangeKind.SAME, sources[0][0], 0, f"{len(patterns)} patterns", f"in control/{name}")
    body = b"".join(pattern + b"\n" for pattern in patterns)
    return NewFile(
        f"control/{name}", b"# Written by contentfilter migrate from hsphere.\n" + body, f"goes to {CONTROL}/{name}"
    )


def _general(others: Collection[str], report: MigrationReport) -> None:
    """What is different for every H-Sphere, and what was left alone."""
    report.add(
        ChangeKind.CHANGED, "-", 0, "virus found",
        "clamdmail removes the mail and writes a notice; here it is refused in the SMTP session. For the old way set "
        '[clamd] action = "remove"',
    )  # fmt: skip
    report.add(
        ChangeKind.CHANGED, "-", 0, "users' choices",
        "Remove, Mark and Move, levels and MaxScore are in the panel's database, not in these files; docs/migration.md "
        "says how to write them as columns of the tables",
    )  # fmt: skip
    report.add(
        ChangeKind.CHANGED, "-", 0, "a scanner is down",
        "H-Sphere never said what happens; here mail waits without clamd and passes unchecked without spamd: [failure]",
    )  # fmt: skip
    report.add(
        ChangeKind.CHANGED, "-", 0, "qmail-queue",
        "H-Sphere's own asks its tables and starts clamdmail by itself; empty the old tables, or mail is checked twice",
    )  # fmt: skip
    for other in sorted(others):
        known = other in QMAIL or other in _EXPIRED
        what = "belongs to H-Sphere's qmail and goes on there" if known else "not a control of the content filter"
        report.add(ChangeKind.LEFT, ".", 0, other, f"{what}; not read")
