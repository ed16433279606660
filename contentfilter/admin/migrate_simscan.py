"""Migration from simscan: simcontrol (or its cdb), ssattach, simsizelimit.

Facts (source, README and ChangeLog of simscan 1.4): for one message the default row, the sender's rows and then each
recipient's are merged, and one result applies to all. Spam is refused from ``spam_hits`` on, and below it delivered as
rewritten by spamd. Mail of relaying clients is not checked for spam. If clamd fails, mail is deferred; if spamd fails,
it passes.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from contentfilter.admin.migration import (
    CONTROL,
    NAMES,
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
_SIZE = 250_000  # limit of simscan for spamd if none is set


def migrate(old: Mapping[str, bytes], others: Collection[str] = ()) -> Migration:
    """Convert the files in ``old`` (name → content). ``others``: names of files that were not read."""
    report = MigrationReport()
    rows = {row.key: row for row in read_rows(old, report) if _found_by_simscan(row, report)}
    if not rows and not any(name in old for name in ("simcontrol", "simcontrol.cdb", "ssattach", "simsizelimit")):
        report.check("simcontrol", 0, "not here", "no control file of simscan; specify the control directory of qmail")
        return Migration((), report.differences())
    if not rows:
        report.check(
            "simcontrol",
            0,
            "no rows",
            "simscan scans all mail if built without --enable-per-domain, otherwise none; all mail is assumed",
        )
        endings = read_endings(old.get("ssattach", b""), report)
        rows[b""] = SimscanRow("ssattach", 0, b"", SimscanRules(clam=True, spam=True, attach=endings or None))
    elif "ssattach" in old:
        report.changed("ssattach", 0, "not used", "a simscan with rows in simcontrol never reads it; skipped")
    for name in ("simversions", "simversions.cdb"):
        if name in old:
            report.left(name, 0, "scanner versions", "not needed: the scanners are asked for their versions")
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
        report.left(".", 0, f"{len(others)} other files", "control files of qmail; not read")
    return Migration(tuple(files), report.differences())


def _found_by_simscan(row: SimscanRow, report: MigrationReport) -> bool:
    """True if the key is an address or a domain. simscan looks up nothing else, and has no wildcards."""
    usable = not row.key or (not row.key.startswith((b"@", b"*", b".")) and table_key(row.key) is not None)
    if not usable:
        why = "neither an address nor a domain, so simscan never finds this row; skipped"
        report.check(row.path, row.line, row.key, why)
    return usable


def _spamd(whole: Mapping[bytes, SimscanRules], default: SimscanRules, report: MigrationReport) -> dict[str, Value]:
    """Section [spamd]: the action for spam unless a row sets another one."""
    scanned = [rules for rules in whole.values() if rules.spam]
    path, score = "simcontrol", default.spam_hits
    if not scanned:
        return {}
    if any(rules.spam_hits is not None for rules in scanned):
        if any(rules.spam_hits is None for rules in scanned):
            score = _HITS
            report.check(
                path,
                0,
                "rows without spam_hits",
                f"they use the value of ./configure --enable-spam-hits; {_HITS} is assumed: [spamd] reject_score",
            )
        if any(rules.spam_passthru is not None for rules in scanned):
            report.changed(path, 0, "spam_passthru", "has no effect in a simscan with spam_hits; skipped")
        return {"action": "mark", "rewrite": "full"} | ({"reject_score": score} if score else {})
    if any(rules.spam_passthru is not None for rules in scanned):
        return {"action": "mark" if default.spam_passthru else "reject", "rewrite": "full"}
    report.check(
        path,
        0,
        "no spam_hits, no spam_passthru",
        "./configure determines whether spam is refused; here it is marked and delivered; to refuse it, set "
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
    """clamavclients and spamdclients: a row if scanning is on, an exempting row if it is off."""
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
        report.same(row.path, row.line, key or b":", "; ".join(said) or "no scanning for all others")
        if rules.trophie:
            report.changed(row.path, row.line, "trophie=yes", "Trophie is not supported; clamd scans for viruses")
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
            report.check(path, line, first, "not a plain number of bytes; skipped")
    if limit is None:
        limit = _SIZE
        report.changed(
            path,
            0,
            "no size_limit",
            f"simscan's built-in limit of {_SIZE} bytes is used; with older versions raise samsgsize (spamc)",
        )
    elif limit < 2:
        report.check(path, line, f"size_limit={limit}", "disables spamd in simscan; skipped")
    else:
        report.same(path, line, f"size_limit={limit}", f"samsgsize {limit - 1}: larger mail is not sent to spamd")
    for row in rows.values():
        if row.key and row.own.size_limit is not None and row.own.size_limit != limit:
            report.lost(
                row.path,
                row.line,
                f"size_limit={row.own.size_limit}",
                "there is one limit for all recipients: samsgsize in control/options",
            )
    report.changed(
        "simcontrol",
        0,
        "RELAYCLIENT",
        "skipsachk 2: no spam check for relaying or authenticated clients, as in a simscan built without "
        "--enable-spam-auth-user; with it, remove the line",
    )
    yield options_file("simscan", {"skipsachk": "2"} | ({"samsgsize": str(limit - 1)} if limit >= 2 else {}))


def _queue(rows: Mapping[bytes, SimscanRow], default: SimscanRules, report: MigrationReport) -> Iterator[str]:
    """Lines of queue.conf: the program that the hook starts."""
    for row in rows.values():
        if row.own.qmailqueue is None:
            continue
        value = readable(row.own.qmailqueue)
        if row.key:
            text = "the hook starts one program for all mail: `queue` in queue.conf"
            report.lost(row.path, row.line, f"qmailqueue={value}", text)
        else:
            report.same(row.path, row.line, f"qmailqueue={value}", "`queue` in queue.conf")
    yield "# Program that the hook starts. After `contentfilter hook install` it is qmail-queue.real instead."
    yield f"queue {readable(default.qmailqueue or b'/var/qmail/bin/qmail-queue')}"


def _attachments(
    rows: Mapping[bytes, SimscanRow], whole: Mapping[bytes, SimscanRules], report: MigrationReport
) -> Iterator[NewFile]:
    """Database for clamd that matches the names of attachments with a forbidden extension."""
    lists: set[frozenset[bytes]] = {frozenset(rules.attach or ()) for rules in whole.values()} | (
        {frozenset()} if b"" not in whole else set()
    )
    wanted = sorted(frozenset().union(*lists))
    if not wanted:
        return
    for_all = frozenset.intersection(*lists)
    text = "# Put this into clamd's DatabaseDirectory. Lines with # are not in force.\n"
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
            report.check(
                row.path,
                row.line,
                key or b":",
                "forbids attachments without a virus check; here clamd detects them, so the virus check must be on",
            )
        if row.own.attach:
            report.changed(
                row.path,
                row.line,
                b"attach=" + b":".join(row.own.attach),
                "refused through clamd/contentfilter-attachments.cdb, for all recipients with a virus check",
            )
    if len(lists) > 1:
        report.check(
            rows[next(iter(rows))].path,
            0,
            "attach",
            "rows forbid different extensions, but clamd has no recipients: those that all rows forbid are in force "
            "in contentfilter-attachments.cdb, the rest is commented out",
        )
    yield NewFile(
        "clamd/contentfilter-attachments.cdb",
        text.encode("ascii"),
        "goes to clamd's DatabaseDirectory; then clamdscan --reload",
    )


def _general(rows: Mapping[bytes, SimscanRow], whole: Mapping[bytes, SimscanRules], report: MigrationReport) -> None:
    """Differences that apply to every row."""
    if len(set(whole.values())) > 1:
        report.check(
            "simcontrol",
            0,
            "sender",
            "simscan applies a row also to mail from that address or domain; here rows are for recipients. Outgoing "
            "mail is checked if there is a row for all recipients (*)",
        )
        report.changed(
            "simcontrol",
            0,
            "several recipients",
            "simscan applies the result of the last row found to all; here each recipient has its own result",
        )
    report.changed(
        "simcontrol",
        0,
        "built in",
        "options of ./configure are not in these files: --enable-dropmsg, --enable-quarantinedir, --enable-spamc-args, "
        "--enable-spamc-user and the like; docs/migration.md lists what to set for each",
    )
    report.left(
        "tcp.smtp",
        0,
        "environment",
        "QMAILQUEUE and RELAYCLIENT are set in tcp.smtp, which is not converted: change QMAILQUEUE in it by hand",
    )
