"""The canary's samples are caught by what they are for, and its mark can be made by nobody else."""

import hashlib
import string
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import contentfilter
from contentfilter.doors import canary
from contentfilter.doors.canary import recognise, sign
from contentfilter.model import Scanner
from contentfilter.monitor import samples
from contentfilter.monitor.samples import make_samples
from contentfilter.policy.overrides import AllowEntry
from contentfilter.scanners.signatures.engine import Engine, Rule, Rules, default_loadertypes, default_signatures
from contentfilter.settings import ClamdSettings, Settings, SpamdSettings

# Not the strings themselves: no scanner shall stop at this file.
EICAR_SHA256 = "275a021bbfb6489e54d471899f7db9d1663fc695ec2fe2a2c4538aabf651fd0f"
NOTHING = Settings(clamd=ClamdSettings(backends=()), spamd=SpamdSettings(backends=()))
KEY, NONCE, NOW = b"k" * 32, "0123456789abcdef" * 2, 1_800_000_000.0
LETTERS = string.ascii_letters + string.digits + "+/"


def body(name: str) -> bytes:
    samples = {s.name: s for s in make_samples(Settings(), default_signatures(), default_loadertypes())}
    payload = message_from_bytes(samples[name].message(NONCE, NOW)).get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload


def program(signatures: Rules | None, loadertypes: Rules | None) -> samples.Sample:
    return make_samples(Settings(), signatures, loadertypes)[3]


def test_the_virus_is_the_test_file_to_the_byte() -> None:
    """Databases know it by its hash, too, so nothing may stand before or behind it."""
    assert hashlib.sha256(body("eicar")).hexdigest() == EICAR_SHA256


def test_the_clean_one_is_clean_for_the_signatures() -> None:
    for mode in ("mime", "compatible"):
        engine = Engine(default_signatures(), default_loadertypes(), mode)
        for sample in make_samples(Settings(), default_signatures(), None)[:3]:
            assert engine.scan(sample.message(NONCE, NOW)) is None, sample.name


@pytest.mark.parametrize("mode", ["mime", "compatible"])
@pytest.mark.parametrize("rule", default_loadertypes().rules, ids=lambda rule: rule.pattern)
def test_every_built_in_loader_type_makes_a_sample_that_is_caught(rule: Rule, mode) -> None:
    rules = Rules(Scanner.LOADERTYPES, (rule,))
    finding = Engine(None, rules, mode).scan(program(None, rules).message(NONCE, NOW))
    assert finding is not None
    assert (finding.scanner, finding.rule) == (Scanner.LOADERTYPES, rule.pattern)


@pytest.mark.parametrize("mode", ["mime", "compatible"])
@pytest.mark.parametrize("rule", default_signatures().rules, ids=lambda rule: rule.pattern)
def test_every_built_in_signature_makes_a_sample_that_is_caught_or_says_that_it_cannot(rule: Rule, mode) -> None:
    rules = Rules(Scanner.SIGNATURES, (rule,))
    sample = program(rules, None)
    if sample.skip:
        assert rule.pattern[:2] != "TV"  # those that look like text
        return
    finding = Engine(rules, None, mode).scan(sample.message(NONCE, NOW))
    assert finding is not None
    assert finding.rule == rule.pattern


@given(st.lists(st.text(LETTERS + "*", min_size=4, max_size=80), min_size=1, max_size=4, unique=True))
def test_a_sample_from_any_list_is_caught_by_that_list(patterns: list[str]) -> None:
    good = tuple(Rule(p, "") for p in patterns if len(p.replace("*", "")) >= 4)
    rules = Rules(Scanner.SIGNATURES, good)
    sample = program(rules, None)
    if not sample.skip:
        assert Engine(rules, None, "mime").scan(sample.message(NONCE, NOW)) is not None


@given(st.text(LETTERS, min_size=4, max_size=80))
def test_a_sample_from_any_loader_type_is_caught(pattern: str) -> None:
    rules = Rules(Scanner.LOADERTYPES, (Rule(pattern, ""),))
    sample = program(None, rules)
    assert not sample.skip
    assert Engine(None, rules, "mime").scan(sample.message(NONCE, NOW)) is not None


def test_a_rule_that_is_let_through_makes_no_sample() -> None:
    rules = default_signatures()
    first = program(rules, None).message(NONCE, NOW)
    allowed = AllowEntry(
        signature=rules.rules[0].pattern, by="alice", reason="a false alarm", since=0.0, until=NOW + 60
    )
    second = make_samples(Settings(), rules, None, (allowed,))[3].message(NONCE, NOW)
    engine = Engine(rules, None, "mime")
    assert engine.scan(first).rule == allowed.signature
    assert engine.scan(second).rule == rules.rules[1].pattern


def test_what_is_switched_off_is_skipped_and_says_why() -> None:
    assert {s.name: s.skip for s in make_samples(NOTHING, None, None)} == {
        "clean": "no scanner is configured",
        "eicar": "[clamd] backends is empty",
        "gtube": "[spamd] backends is empty",
        "signature": "chksignature and chkloadertype are off",
    }
    only = make_samples(NOTHING, Rules(Scanner.SIGNATURES, ()), None)
    assert only[3].skip == "no rule in force that a sample can be made from"


def test_no_installed_file_holds_a_test_string() -> None:
    """A virus scanner would delete it. The compiled modules count, too."""
    strings = [body("eicar"), body("gtube").splitlines()[-1]]
    package = Path(contentfilter.__file__).parent
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(package / "ops" / "canary.py")], check=True)
    files = [path for path in package.rglob("*") if path.is_file()]
    assert any(path.name.startswith("canary.") and path.suffix == ".pyc" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(text in content for text in strings), path


# The mark


def environ(message: bytes = b"m", **changes) -> dict[bytes, bytes]:
    facts = {"secret": KEY, "sample": "eicar", "nonce": NONCE, "expires": int(NOW) + 60} | changes
    return {b"CONTENTFILTER_CANARY": sign(**facts, message=message).encode()}


def test_a_mark_says_which_sample_it_is() -> None:
    assert recognise(environ(), KEY, b"m", NOW) == canary.CanaryMark("eicar", NONCE)


def test_a_mark_holds_while_a_hook_offers_its_message_again() -> None:
    mark = environ()
    assert recognise(mark, KEY, b"m", NOW) == recognise(mark, KEY, b"m", NOW + 59)


@pytest.mark.parametrize(
    ("what", "key", "message", "now"),
    [
        ({}, KEY, b"m", NOW),
        ({b"CONTENTFILTER_CANARY": b""}, KEY, b"m", NOW),
        ({b"CONTENTFILTER_CANARY": b"1:" * 200}, KEY, b"m", NOW),
        (environ(secret=b"other"), KEY, b"m", NOW),
        (environ(secret=b""), b"", b"m", NOW),  # a key that could not be read proves nothing
        (environ(), KEY, b"another message", NOW),
        (environ(), KEY, b"m", NOW + 61),
        (environ(expires=int(NOW) + canary.LIFETIME + 1), KEY, b"m", NOW),  # of a clock that was set back
        (environ(sample="other"), KEY, b"m", NOW),
        (environ() | {b"TCPREMOTEIP": b"192.0.2.1"}, KEY, b"m", NOW),
        (environ() | {b"RELAYCLIENT": b""}, KEY, b"m", NOW),
        ({b"CONTENTFILTER_CANARY": environ()[b"CONTENTFILTER_CANARY"] + b"\n"}, KEY, b"m", NOW),
    ],
    ids=[
        "none",
        "empty",
        "junk",
        "forged",
        "no key",
        "other bytes",
        "late",
        "early",
        "unknown",
        "smtp",
        "relay",
        "tail",
    ],
)
def test_anything_else_is_mail(what, key, message, now) -> None:
    assert recognise(what, key, message, now) is None


def test_every_byte_of_a_mark_counts() -> None:
    (value,) = environ().values()
    for at in range(len(value)):
        changed = value[:at] + (b"0" if value[at : at + 1] != b"0" else b"1") + value[at + 1 :]
        assert recognise({b"CONTENTFILTER_CANARY": changed}, KEY, b"m", NOW) is None, at


def test_a_released_message_cannot_be_turned_into_a_mark() -> None:
    """One key, two uses: what is signed for one says nothing for the other."""
    told = f"1:eicar:{NONCE}:{int(NOW) + 60}:{hashlib.sha256(b'm').hexdigest()}".encode()
    from contentfilter.store import release_token

    value = told + b":" + release_token._mac(KEY, told, ())
    assert recognise({b"CONTENTFILTER_CANARY": value}, KEY, b"m", NOW) is None
