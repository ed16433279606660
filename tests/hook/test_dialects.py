"""A refusal reaches the caller in the way that this qmail knows, and falls back to 31 and 71."""

import pytest
from lab.hook import HookLab, Kind

from contentfilter.wire.hook import Action, Answer, Reason

TEXT = "5.7.1 refused: Eicar-Test-Signature (incident 42)"
SAID = {Action.REJECT: b"D" + TEXT.encode(), Action.DEFER: b"Z" + TEXT.encode()}
PLAIN = {Action.REJECT: 31, Action.DEFER: 71}
OTHERS: list[Kind] = ["closed", "read end", "full pipe", "deaf pipe", "socket", "file"]
REFUSALS = pytest.mark.parametrize("action", [Action.REJECT, Action.DEFER])
DIALECTS = [("notqmail", 6, 82), ("simscan", 4, 82), ("sagredo", 4, 82), ("auto", 6, 82), ("auto", 4, 82)]


@REFUSALS
@pytest.mark.parametrize(("dialect", "fd", "status"), DIALECTS)
def test_text_goes_into_the_pipe(both: HookLab, action: Action, dialect: str, fd: int, status: int) -> None:
    both.daemon(Answer(action, Reason.VIRUS, TEXT))
    result = both.run(dialect=dialect, fds={fd: "pipe"})
    assert (result.status, result.texts[fd], result.stderr) == (status, SAID[action], b"")
    assert both.standin.queued() == []


@REFUSALS
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("dialect", "fd", "status"), DIALECTS)
def test_what_is_no_free_pipe_is_left_alone(
    lab: HookLab, action: Action, dialect: str, fd: int, status: int, kind: Kind
) -> None:
    lab.daemon(Answer(action, Reason.VIRUS, TEXT))
    result = lab.run(dialect=dialect, fds={fd: kind})
    assert result.status == PLAIN[action]
    assert TEXT.encode() not in result.texts.get(fd, b"")


@REFUSALS
def test_stock_says_nothing_anywhere(lab: HookLab, action: Action) -> None:
    lab.daemon(Answer(action, Reason.VIRUS, TEXT))
    result = lab.run(dialect="stock", fds={4: "pipe", 6: "pipe"})
    assert (result.status, result.texts, result.stderr) == (PLAIN[action], {4: b"", 6: b""}, b"")


def test_auto_prefers_notqmails_descriptor(lab: HookLab) -> None:
    lab.daemon(Answer(Action.REJECT, Reason.VIRUS, TEXT))
    result = lab.run(fds={4: "pipe", 6: "pipe"})
    assert (result.status, result.texts) == (82, {4: b"", 6: SAID[Action.REJECT]})


@pytest.mark.parametrize("kind", ["closed", "read end", "socket", "file"])
def test_auto_looks_further_when_the_first_is_no_pipe_to_write_to(lab: HookLab, kind: Kind) -> None:
    lab.daemon(Answer(Action.REJECT, Reason.VIRUS, TEXT))
    result = lab.run(fds={4: "pipe", 6: kind})
    assert (result.status, result.texts[4]) == (82, SAID[Action.REJECT])


@pytest.mark.parametrize("name", ["SSLCTLFD", "SSLREADFD", "SSLWRITEFD"])
def test_auto_keeps_off_a_tls_control_pipe(lab: HookLab, name: str) -> None:
    lab.daemon(Answer(Action.REJECT, Reason.VIRUS, TEXT))
    result = lab.run(fds={4: "pipe"}, env={name: "4"})
    assert (result.status, result.texts) == (31, {4: b""})


@REFUSALS
def test_indimail_reads_stderr(both: HookLab, action: Action) -> None:
    both.daemon(Answer(action, Reason.SPAM, TEXT))
    result = both.run(dialect="indimail")
    assert (result.status, result.stderr) == (88, SAID[action])


@pytest.mark.parametrize(("dialect", "status"), [("indimail", 88), ("sagredo", 82)])
@pytest.mark.parametrize(("value", "works"), [("7", True), ("-1", False), ("x", False), ("99999999999", False)])
def test_error_fd_moves_the_text(lab: HookLab, dialect: str, status: int, value: str, works: bool) -> None:
    lab.daemon(Answer(Action.REJECT, Reason.SPAM, TEXT))
    result = lab.run(dialect=dialect, fds={7: "pipe"}, env={"ERROR_FD": value})
    assert result.status == (status if works else 31)
    assert result.texts[7] == (SAID[Action.REJECT] if works else b"")
    assert result.stderr == b""


@pytest.mark.parametrize("kind", ["closed", "socket", "file"])
def test_indimail_without_a_pipe_on_stderr(lab: HookLab, kind: Kind) -> None:
    lab.daemon(Answer(Action.REJECT, Reason.SPAM, TEXT))
    assert lab.run(dialect="indimail", fds={2: kind}).status == 31


def test_indimails_stderr_carries_no_chatter(lab: HookLab) -> None:
    result = lab.run(dialect="indimail", budget=1)  # no daemon: elsewhere this is a line on stderr
    assert result.status == 88
    assert result.stderr.startswith(b"Z")
    assert b"\n" not in result.stderr


@pytest.mark.parametrize(
    ("reason", "status"),
    [(Reason.VIRUS, 32), (Reason.SPAM, 33), (Reason.BANNED, 34), (Reason.NONE, 31), (Reason.SIZE, 31)],
)
def test_sqmail_tells_the_reason_by_status(both: HookLab, reason: Reason, status: int) -> None:
    both.daemon(Answer(Action.REJECT, reason, TEXT))
    result = both.run(dialect="sqmail", fds={4: "pipe", 6: "pipe"})
    assert (result.status, result.texts) == (status, {4: b"", 6: b""})


def test_sqmail_defers_with_the_portable_status(lab: HookLab) -> None:
    lab.daemon(Answer(Action.DEFER, Reason.VIRUS, TEXT))
    assert lab.run(dialect="sqmail").status == 71


@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_that_qmail_would_not_print_is_not_sent(lab: HookLab, text: str) -> None:
    lab.daemon(Answer(Action.REJECT, Reason.NONE, text))
    assert lab.run(fds={6: "pipe"}).status == 31


def test_the_longest_text(both: HookLab) -> None:
    both.daemon(Answer(Action.REJECT, Reason.NONE, "t" * 250))
    result = both.run(fds={6: "pipe"})
    assert (result.status, result.texts[6]) == (82, b"D" + b"t" * 250)


def test_drop_is_success_without_a_trace(both: HookLab) -> None:
    both.daemon(Answer(Action.DROP))
    result = both.run(fds={4: "pipe", 6: "pipe"})
    assert (result.status, result.texts, both.standin.queued()) == (0, {4: b"", 6: b""}, [])
