"""simscan's controls become ours: simcontrol (or its cdb), ssattach, simsizelimit.

Facts (source, README and ChangeLog of simscan 1.4): for one message the default row, the sender's rows and then each
recipient's are laid over each other, and one result holds for all. Spam is refused from ``spam_hits`` on, and below
delivered as spamd rewrote it. Mail of relaying clients is not checked for spam. clamd's faults defer, spamd's pass.
"""

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
    Value,
    name_files,
    options_file,
    queue_file,
    settings_file,
    table_file,
    table_key,
)
from contentfilter.admin.simscan_rows import SimscanRow, SimscanRules, effective, read_endings, read_rows
from contentfilter.model import readable

READS = ("simcontrol", "simcontrol.cdb", "ssattach", "simsizelimit", "simversions", "simversions.cdb", *NAMES)
_HITS = 10.0  # ./configure --enable-spam-hits without a number
_SIZE = 250_000  # simscan's limit for spamd where none is given


def migrate(old: Mapping[str, bytes], others: Collection[str] = ()) -> Migration:
    """Turn the files in ``old`` (name → content) into ours; ``others`` are names that were not read."""
    report = MigrationReport()
    rows = {row.key: row for row in read_rows(old, report) if _found_by_simscan(row, report)}
    if not rows and not any(name in old for name in ("simcontrol", "simcontrol.cdb", "ssattach", "simsizelimit")):
        report.add(
            ChangeKind.CHECK, "simcontrol", 0, "not here", "none of simscan's controls; give qmail's control directory"
        )
        return Migration((), report.differences())
    if not rows:
        report.add(
            ChangeKind.CHECK,
            "simcontrol",
            0,
            "no rows",
            "a simscan built without --enable-per-domain scans all mail, else it scans none; all mail is assumed",
        )
        endings = read_endings(old.get("ssattach", b""), report)
        rows[b""] = SimscanRow("ssattach", 0, b"", SimscanRules(clam=True, spam=True, attach=endings or None))
    elif "ssattach" in old:
        report.add(
            ChangeKind.CHANGED, "ssattach", 0, "not used", "a simscan with rows in simcontrol never reads it; left out"
        )
    for name in ("simversions", "simversions.cdb"):
        if name in old:
            report.add(
                ChangeKind.LEFT, name, 0, "scanner versions", "not needed: the versions are asked from the scanners"
            )
    whole = {key: effective(row, rows) for key, row in rows.items()}
    default = whole.get(b"", SimscanRules())
    spamd = _spamd(whole, default, report)
    files = [*_tables(rows, whole, spamd, report), *_options(old, rows, default, report)]
    settings: dict[str, dict[str, Value]] = {"service": {"control": CONTROL}}
    if any(b"@" in key for key in rows):
        settings["tables"] = {"extension": "-"}
    if any(rules.spam for rules in whole.values()):
        settings["spamd"] = spamd
    files += [settings_file("simscan", settings), queue_file("simscan", _queue(rows, default, report))]
    files += [*_attachments(rows, whole, report), *name_files(old, report)]
    _general(rows, whole, report)
    if others:
        report.add(
            ChangeKind.LEFT, ".", 0, f"{len(others)} other files", "qmail's own controls; nothing is read from them"
        )
    return Migration(tuple(files), report.differences())


def _found_by_simscan(row: SimscanRow, report: MigrationReport) -> bool:
    """Whether the key is an address or a domain. simscan looks up nothing else, and no wildcards."""
    usable = not row.key or (not row.key.startswith((b"@", b"*", b".")) and table_key(row.key) is not None)
    if not usable:
        why = "neither an address nor a domain, so simscan never finds this row; left out"
        report.add(ChangeKind.CHECK, row.path, row.line, row.key, why)
    return usable


def _spamd(whole: Mapping[bytes, SimscanRules], default: SimscanRules, report: MigrationReport) -> dict[str, Value]:
    """The section [spamd]: what happens to spam where a row says nothing else."""
    scanned = [rules for rules in whole.values() if rules.spam]
    path, score = "simcontrol", default.spam_hits
    if not scanned:
        return {}
    if any(rules.spam_hits is not None for rules in scanned):
        if any(rules.spam_hits is None for rules in scanned):
            score = _HITS
            report.add(
                ChangeKind.CHECK,
                path,
                0,
                "rows without spam_hits",
                f"they use the number of ./configure --enable-spam-hits; {_HITS} is assumed: [spamd] reject_score",
            )
        if any(rules.spam_passthru is not None for rules in scanned):
            report.add(
                ChangeKind.CHANGED, path, 0, "spam_passthru", "has no effect in a simscan with spam_hits; left out"
            )
        return {"action": "mark", "rewrite": "full"} | ({"reject_score": score} if score else {})
    if any(rules.spam_passthru is not None for rules in scanned):
        return {"action": "mark" if default.spam_passthru else "reject", "rewrite": "full"}
    report.add(
        ChangeKind.CHECK,
        path,
        0,
        "no spam_hits, no spam_passthru",
        "whether spam is refused was chosen at ./configure; it is marked and delivered here; to refuse it, set "
        '[spamd] action = "reject" or a reject_score',
    )
    return {"action": "mark", "rewrite": "full"}


def _spam_options(rules: SimscanRules, spamd: Mapping[str, Value]) -> tuple[tuple[str, str], ...]:
    if rules.spam_hits is not None:
        same = rules.spam_hits == spamd.get("reject_score")
        return () if same else (("reject_score", f"{rules.spam_hits:.6f}".rstrip("0").rstrip(".")),)
    if rules.spam_passthru is None and spamd["action"] == "mark":
        return ()
    action = "mark" if rules.spam_passthru else "reject"
    return () if "reject_score" in spamd or action == spamd["action"] else (("spam", action),)


def _tables(
    rows: Mapping[bytes, SimscanRow],
    whole: Mapping[bytes, SimscanRules],
    spamd: Mapping[str, Value],
    report: MigrationReport,
) -> tuple[NewFile, NewFile]:
    """clamavclients and spamdclients: a row where scanning is on, an exempting one where it is off."""
    virus: list[TableRow] = []
    spam: list[TableRow] = []
    for key, row in rows.items():
        rules = whole[key]
        ours = (table_key(key) or key) if key else b"*"
        said = []
        for name, table, on, options in (
            ("clamavclients", virus, rules.virus, ()),
            ("spamdclients", spam, bool(rules.spam), _spam_options(rules, spamd) if rules.spam else ()),
        ):
            if on or key:
                table.append(TableRow(ours, not on, options))
                said.append(f"{name}: {readable(table[-1].line())}")
        report.add(ChangeKind.SAME, row.path, row.line, key or b":", "; ".join(said) or "no scanning for all others")
        if rules.trophie:
            report.add(
                ChangeKind.CHANGED, row.path, row.line, "trophie=yes", "no Trophie here; clamd does the virus check"
            )
    return table_file("clamavclients", "simscan", virus), table_file("spamdclients", "simscan", spam)


def _options(
    old: Mapping[str, bytes], rows: Mapping[bytes, SimscanRow], default: SimscanRules, report: MigrationReport
) -> Iterator[NewFile]:
    """control/options: the size limit for spamd, and no spam check for relaying clients."""
    limit, path = default.size_limit, next(iter(rows.values())).path
    line = rows[b""].line if b"" in rows else 0
    if limit is None and "simsizelimit" in old:
        path, line = "simsizelimit", 1
        first = old[path].split(b"\n", 1)[0].strip()
        if re.fullmatch(rb"[0-9]{1,12}", first):
            limit = int(first)
        else:
            report.add(ChangeKind.CHECK, path, line, first, "not a plain number of bytes; left out")
    if limit is None:
        limit = _SIZE
        report.add(
            ChangeKind.CHANGED,
            path,
            0,
            "no size_limit",
            f"simscan's built-in {_SIZE} bytes are taken; older ones have spamc's own limit, raise samsgsize then",
        )
    elif limit < 2:
        report.add(
            ChangeKind.CHECK, path, line, f"size_limit={limit}", "keeps all mail from spamd in simscan; left out"
        )
    else:
        report.add(
            ChangeKind.SAME,
            path,
            line,
            f"size_limit={limit}",
            f"samsgsize {limit - 1}: larger mail is not given to spamd",
        )
    for row in rows.values():
        if row.key and row.own.size_limit is not None and row.own.size_limit != limit:
            report.add(
                ChangeKind.LOST,
                row.path,
                row.line,
                f"size_limit={row.own.size_limit}",
                "one limit for all recipients here: samsgsize in control/options",
            )
    report.add(
        ChangeKind.CHANGED,
        "simcontrol",
        0,
        "RELAYCLIENT",
        "skipsachk 2: no spam check for relaying or authenticated clients, as in a simscan built without "
        "--enable-spam-auth-user; with it, take the line out",
    )
    yield options_file("simscan", {"skipsachk": "2"} | ({"samsgsize": str(limit - 1)} if limit >= 2 else {}))


def _queue(rows: Mapping[bytes, SimscanRow], default: SimscanRules, report: MigrationReport) -> Iterator[str]:
    """queue.conf: the program behind the hook."""
    for row in rows.values():
        if row.own.qmailqueue is None:
            continue
        value = readable(row.own.qmailqueue)
        if row.key:
            text = "one program behind the hook for all mail here: `queue` in queue.conf"
            report.add(ChangeKind.LOST, row.path, row.line, f"qmailqueue={value}", text)
        else:
            report.add(ChangeKind.SAME, row.path, row.line, f"qmailqueue={value}", "`queue` in queue.conf")
    yield "# The program behind the hook. After `contentfilter hook install` it is qmail-queue.real instead."
    yield f"queue {readable(default.qmailqueue or b'/var/qmail/bin/qmail-queue')}"


def _attachments(
    rows: Mapping[bytes, SimscanRow], whole: Mapping[bytes, SimscanRules], report: MigrationReport
) -> Iterator[NewFile]:
    """Forbidden file endings become a small database for clamd, which sees the names of attachments itself."""
    lists: set[frozenset[bytes]] = {frozenset(rules.attach or ()) for rules in whole.values()} | (
        {frozenset()} if b"" not in whole else set()
    )
    wanted = sorted(frozenset().union(*lists))
    if not wanted:
        return
    for_all = frozenset.intersection(*lists)
    text = "# Put this into clamd's DatabaseDirectory. A line with # is not in force.\n"
    for ending in wanted:
        # clamd shows a name with _ for all but letters, digits and dots
        pattern = re.sub(rb"[^a-z0-9.]", b"_", ending).replace(b".", rb"\.").decode("ascii")
        name = re.sub(rb"[^a-z0-9]+", b"-", ending).strip(b"-").decode("ascii") or "name"
        text += "" if ending in for_all else "#"
        text += f"ContentFilter.Attachment.{name}:CL_TYPE_MAIL:*:(?i){pattern}$:*:*:*:*:*:*\n"
    for key, row in rows.items():
        if not whole[key].attach:
            continue
        if not whole[key].virus:
            report.add(
                ChangeKind.CHECK,
                row.path,
                row.line,
                key or b":",
                "forbids attachments without a virus check; here clamd finds them, so its check has to be on",
            )
        if row.own.attach:
            report.add(
                ChangeKind.CHANGED,
                row.path,
                row.line,
                b"attach=" + b":".join(row.own.attach),
                "clamd refuses these names, through clamd/contentfilter-attachments.cdb, for all whose mail it checks",
            )
    if len(lists) > 1:
        report.add(
            ChangeKind.CHECK,
            rows[next(iter(rows))].path,
            0,
            "attach",
            "not every row forbids the same endings, but clamd knows no recipients: only what all forbid is in force "
            "in contentfilter-attachments.cdb, the rest is commented out",
        )
    yield NewFile(
        "clamd/contentfilter-attachments.cdb",
        text.encode("ascii"),
        "goes to clamd's DatabaseDirectory; then clamdscan --reload",
    )


def _general(rows: Mapping[bytes, SimscanRow], whole: Mapping[bytes, SimscanRules], report: MigrationReport) -> None:
    """What is different for every row."""
    if len(set(whole.values())) > 1:
        report.add(
            ChangeKind.CHECK,
            "simcontrol",
            0,
            "sender",
            "simscan applies a row also to mail from that address or domain; here rows are for recipients only. Mail "
            "going out is checked where a row for everybody (*) says so",
        )
        report.add(
            ChangeKind.CHANGED,
            "simcontrol",
            0,
            "several recipients",
            "simscan gives all the result of the last row found; here each recipient gets their own",
        )
    report.add(
        ChangeKind.CHANGED,
        "simcontrol",
        0,
        "built in",
        "what ./configure chose is not in these files: --enable-dropmsg, --enable-quarantinedir, --enable-spamc-args, "
        "--enable-spamc-user and the like; docs/migration.md lists what to set for each",
    )
    report.add(
        ChangeKind.LEFT,
        "tcp.smtp",
        0,
        "environment",
        "QMAILQUEUE and RELAYCLIENT are set in tcp.smtp, which is not here: change QMAILQUEUE there by hand",
    )
