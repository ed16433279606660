"""The rules of the product in plain words (docs/flow.md, design 6), one recipient after the other.

:func:`expect` says what must become of one mail under one configuration. It shares no code with the product, knows
nothing of groups, plans and packets, and may be slow.
"""

import re
from dataclasses import dataclass, field

from lab.scripted import CLAMD_FAULTS, SPAMD_FAULTS, script, spam_fields, wrapped

LEVELS = {"very-aggressive": 2, "aggressive": 4, "default": 5, "normal": 7, "relaxed": 10, "permissive": 14}
TAGS = {"": "", "[SPAM] ": "[SPAM] ", "[СПАМ] ": "=?utf-8?b?W9Ch0J/QkNCcXQ==?= "}
SIGNATURE = "TVqQAAMAA"
PROGRAM = f"message carries a Windows program: {SIGNATURE}"
IP = "192.0.2.7"


@dataclass(frozen=True)
class World:
    """Configuration, control files and tables."""

    clamav: dict[str, str] = field(default_factory=dict)  # key -> options, or "!"
    spamd: dict[str, str] = field(default_factory=dict)
    strictest: bool = False
    signatures: str = "reject"
    virus: str = "reject"
    pua: str = ""
    spam: str = "mark"
    reject_score: float = 0.0
    tag: str = ""
    full: bool = False  # rewrite
    own: bool = False  # everybody has preferences of their own
    faults: dict[str, str] = field(default_factory=dict)  # defer or pass, for clamd, spamd, too_big, limits
    trace: bool = True
    scanned: bool = True
    caller: str = "smtp"  # or local, or bounce
    clamglobal: bool = False
    spamglobal: bool = False
    skipcachk: int = 0
    skipsachk: int = 0
    samsgsize: int = 0
    chksignature: bool = True
    maxrecipients: int = 0
    envelope_to: bool = False
    originating: bool = True


@dataclass(frozen=True)
class Mail:
    message: bytes
    recipients: tuple[str, ...]
    client: str = "stranger"  # or relay, or authenticated


@dataclass
class Person:
    """One recipient, and what is known about their copy."""

    address: str
    virus: bool
    spam: bool
    virus_options: dict[str, str]
    spam_options: dict[str, str]
    fate: str = "deliver"  # mark, move, remove, reject, defer: ever stronger
    to: str = ""
    text: str = ""  # what the client reads if it is refused
    virus_word: str = "skipped"
    spam_word: str = "skipped"
    seen_by: str = ""  # scanners that looked for a virus
    virus_name: str = ""
    answer: str = ""  # of spamd, where its headers are wanted
    fields: bytes = b""  # SpamAssassin's
    whole: bytes = b""  # the message as SpamAssassin rewrote it

    def meets(self, fate: str, to: str, text: str) -> None:
        """A finding counts when it is stronger than what was there, until the copy is withheld."""
        if not self.withheld and FATES.index(fate) > FATES.index(self.fate):
            self.fate, self.to, self.text = fate, to if fate == "move" else "", text

    @property
    def withheld(self) -> bool:
        return self.fate in ("remove", "reject", "defer")


FATES = ["deliver", "mark", "move", "remove", "reject", "defer"]


@dataclass
class Expected:
    """With a ``text`` the whole message is refused or deferred; else each recipient has a copy, or theirs is kept."""

    text: str = ""  # a pattern; ID is replaced by the incident, here and in the bytes
    withheld: tuple[int, ...] = ()
    copies: list[tuple[tuple[str, ...], bytes]] = field(default_factory=list)  # for whom, and its bytes


def expect(world: World, mail: Mail) -> Expected:
    origin = mail.client if world.caller == "smtp" else world.caller
    smtp = world.caller == "smtp"
    if smtp and world.maxrecipients and len(mail.recipients) > world.maxrecipients:
        return Expected(text=r"Dtoo many recipients for one message \[ID\] \(#5\.5\.3\)")

    people = [person(world, origin, address) for address in mail.recipients]
    scan(world, mail, origin, people)

    refused = [p for p in people if p.fate == "reject"]
    everybody = tuple(range(len(people)))
    if refused and (world.strictest or len(refused) == len(people)):
        if origin == "bounce":  # qmail-send would retry for ever
            return Expected(withheld=everybody)
        return Expected(text=f"D{refused[0].text} " + r"\[ID\] \(#5\.7\.1\)")
    if deferred := [p for p in people if p.fate == "defer"]:
        return Expected(text=f"Z{deferred[0].text} " + r"\[ID\] \(#4\.3\.0\)")

    kept = [p for p in people if not p.withheld]
    result = Expected(withheld=tuple(i for i in everybody if people[i].withheld))
    while kept:  # equal outcomes travel together
        together = [p for p in kept if form(p) == form(kept[0])]
        kept = [p for p in kept if p not in together]
        to = (together[0].to,) if together[0].to else tuple(p.address for p in together)
        result.copies.append((to, copy(world, mail, smtp, together)))
    return result


def person(world: World, origin: str, address: str) -> Person:
    virus, virus_options = wish(world.clamav, world.clamglobal, world.skipcachk, origin, address)
    spam, spam_options = wish(world.spamd, world.spamglobal, world.skipsachk, origin, address)
    return Person(address, virus, spam, virus_options, spam_options)


def wish(rows: dict[str, str], everybody: bool, skip: int, origin: str, address: str) -> tuple[bool, dict[str, str]]:
    """Is this recipient checked, and with which options? The first rule that applies decides."""
    if (skip >= 1 and origin == "authenticated") or (skip == 2 and origin == "relay"):
        return False, {}
    if everybody:
        return True, {}
    row = row_for(rows, address.lower())
    if row is None or row == "!":
        return False, {}
    return True, dict(word.split("=") for word in row.split())


def row_for(rows: dict[str, str], address: str) -> str | None:
    """The most specific row: the address, its domain, the parents of the domain from the nearest on, everybody."""
    _, at, domain = address.partition("@")
    labels = domain.split(".")
    keys = [address, "@" + domain, *("." + ".".join(labels[n:]) for n in range(1, len(labels)))] if at else []
    return next((rows[key] for key in [*keys, "*"] if key in rows), None)


def scan(world: World, mail: Mail, origin: str, people: list[Person]) -> None:
    """Each scanner in turn, while its answer can still change something for somebody."""
    says = script(mail.message)
    program = SIGNATURE.encode() in mail.message
    words, found, said = [], "", []  # of the virus scanners

    def open_for(check: str) -> list[Person]:
        if any(p.fate == "defer" for p in people):
            return []
        if world.strictest and any(p.fate == "reject" for p in people):
            return []
        return [p for p in people if getattr(p, check) and not p.withheld]

    if world.chksignature and (asked := open_for("virus")):
        words.append("found" if program else "clean")
        said.append("signatures")
        if program:
            found = SIGNATURE
            for p in asked:
                meet(
                    p, p.virus_options.get("virus", world.signatures), f"message carries a Windows program: {SIGNATURE}"
                )
    if asked := open_for("virus"):
        word = says["clamd"]
        pua = word.startswith("PUA.")
        if word in CLAMD_FAULTS:
            words.append("unchecked")
            failed(world, origin, {"limits": "limits", "too-big": "too_big"}.get(word, "clamd"), asked, "virus check")
        elif word == "clean" or (pua and world.pua == "pass"):
            words.append("clean")
            said.append("clamd")
        else:
            words.append("found")
            said.append("clamd")
            found = found or word
            for p in asked:
                action = world.pua if pua and world.pua else p.virus_options.get("virus", world.virus)
                meet(p, action, f"message contains a virus: {re.escape(word)}")
    for p in people:
        if p.virus:
            p.virus_word = next((w for w in ("found", "unchecked", "clean") if w in words), "skipped")
    if not 0 < world.samsgsize < len(mail.message):
        spam_check(world, mail, origin, open_for("spam"), people)
    for p in people:
        p.seen_by, p.virus_name = ", ".join(said), found


def meet(p: Person, action: str, text: str) -> None:
    fate, _, to = action.partition(":")
    p.meets(fate, to, text)


def failed(world: World, origin: str, kind: str, asked: list[Person], what: str) -> None:
    """Bounces always pass: qmail-send would retry for ever."""
    if origin != "bounce" and world.faults[kind] == "defer":
        for p in asked:
            p.meets("defer", "", what + r" not possible now \([^)]+\), please try again")


def spam_check(world: World, mail: Mail, origin: str, asked: list[Person], people: list[Person]) -> None:
    if not asked:
        return
    says = script(mail.message)
    wanting = [p for p in people if p.spam]
    actions = {p.spam_options.get("spam", world.spam).partition(":")[0] for p in wanting}
    headers = bool(actions & {"mark", "move"})  # else nobody would read them
    owners = {p.address.lower() for p in asked}
    for p in wanting:
        own = p.address.lower()
        if world.own and own not in owners:
            continue  # nobody asked for these preferences: it was decided before
        answer = says.get(own if world.own else "", says["spamd"])
        if answer in SPAMD_FAULTS:
            p.spam_word = "unchecked"
            failed(world, origin, "spamd", [p], "spam check")
            continue
        score, required = map(float, answer.split("/"))
        level = p.spam_options.get("score")
        limit = required if level is None else float(LEVELS.get(level, level))
        p.spam_word = "found" if score >= limit else "clean"
        agreed = (score >= limit) == (score >= required)
        if headers:
            p.answer = answer
            p.fields = spam_fields(score, required) if agreed else overruled(score, p.spam_word == "found")
            if world.full and agreed and p.spam_word == "found":
                p.whole = wrapped(mail.message, score, required)
        never = float(p.spam_options.get("reject_score", world.reject_score))
        if never and score >= never:
            p.meets("reject", "", rf"message looks like spam \({score:g} >= reject_score={never:g}\)")
        elif p.spam_word == "found":
            meet(p, p.spam_options.get("spam", world.spam), rf"message looks like spam \({score:g} / {limit:g}\)")


def overruled(score: float, found: bool) -> bytes:
    """SpamAssassin's lines with the verdict of the recipient's own threshold, and without its own."""
    flag = b"X-Spam-Flag: YES\n" if found else b""
    return flag + b"X-Spam-Status: %s, score=%.1f tests=A,\n\tB version=4.0\n" % (b"Yes" if found else b"No", score)


def form(p: Person) -> object:
    """Copies are equal when these are."""
    return p.virus_word, p.spam_word, p.fate, p.to, p.answer


def copy(world: World, mail: Mail, smtp: bool, together: list[Person]) -> bytes:
    """Our lines, then the message; nothing else changes but a spam's subject and forged copies of our lines."""
    first = together[0]
    lines = b""
    if world.trace:
        lines += f"X-ContentFilter: ID; virus={first.virus_word}; spam={first.spam_word}\n".encode()
    if world.scanned and first.virus_word in ("clean", "found"):
        lines += f"X-Virus-Scanned: contentfilter ({first.seen_by})\n".encode()
        lines += f"X-Virus-Status: {f'Infected ({first.virus_name})' if first.virus_name else 'Clean'}\n".encode()
    if smtp and world.originating:
        lines += f"X-Originating-IP: [{IP}]\n".encode()
    if first.to or (world.envelope_to and len(together) == 1):
        lines += b"".join(f"X-Envelope-To: {p.address}\n".encode() for p in together)
    message = first.whole or mail.message
    head, gap, body = message.partition(b"\n\n")
    for name, ours in (
        (b"X-ContentFilter:", True),
        (b"X-Virus-Status:", first.virus_word != "skipped"),
        (b"X-Spam-Flag:", first.spam_word != "skipped" and not first.whole),
    ):
        if ours:
            head = head.replace(name, b"X-Received-" + name)
    if first.spam_word == "found":
        head = head.replace(b"Subject: ", b"Subject: " + TAGS[world.tag].encode())
    return lines + (b"" if first.whole else first.fields) + head + gap + body
