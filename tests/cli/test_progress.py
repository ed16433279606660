"""Long work says how far it is: drawn on a terminal, a line now and then elsewhere, and never on standard output."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import terminal

from contentfilter.cli.progress import progress

WAIT = 20.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_without_a_terminal_a_line_comes_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def lines() -> list[str]:
        said.extend(capfd.readouterr().err.splitlines())
        return said

    with progress("released", 1_200, every=0.02) as bar:
        until(lambda: any("released: 0 of 1,200, after 0 s" in line for line in lines()))
        for _ in range(1_100):
            bar.step()
        until(lambda: any("released: 1,100 of 1,200" in line for line in lines()))
        bar.say("a1: gone")
    assert "a1: gone" in lines()
    with progress("reading", every=0.02):
        until(lambda: any(line.startswith("contentfilter: reading, after ") for line in lines()))
    assert not any("\x1b" in line for line in said)


def test_quick_work_without_a_terminal_says_nothing_and_ends_immediately(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with progress("reading"):
        pass
    with pytest.raises(ZeroDivisionError), progress("reading", 3) as bar:
        bar.count //= 0
    assert time.monotonic() - began < 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_an_import_draws_on_the_terminal_only_and_json_stays_clean(term: str, tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    config = tmp_path / "contentfilter.toml"
    config.write_text(f'[service]\ncontrol = "{tmp_path}/control"\nstate = "{tmp_path}"\nrun = "{tmp_path}"\n')
    (tmp_path / "rows").write_text("".join(f"user{number}@example.com\n" for number in range(5_000)))
    words = ["-m", "contentfilter", "--config", str(config), "clients", "import", "--json", str(tmp_path / "rows")]
    out, shown = terminal.run(words, {"TERM": term})
    assert json.loads(out)["tables"]["clamavclients"]["added"] == 5_000
    if term == "dumb":
        assert b"\x1b[" not in shown
    else:
        assert b"checking 5,000 lines" in shown
        assert b"writing 5,000 rows" in shown
    plain = subprocess.run([sys.executable, *words], capture_output=True, check=True, timeout=WAIT)
    assert json.loads(plain.stdout)["tables"]["clamavclients"]["same"] == 5_000
    assert b"\x1b" not in plain.stderr
    assert b"checking" not in plain.stderr


def test_what_is_drawn_is_never_taken_for_markup(tmp_path: Path) -> None:
    code = (
        "from contentfilter.cli.progress import progress\n"
        "with progress('[bold]x[/nonsense]', 3) as bar:\n"
        "    bar.step(); bar.say('[red]a1[/]: gone'); bar.step(); bar.step()\n"
    )
    out, shown = terminal.run(["-c", code], {"TERM": "xterm"})
    assert out == b""
    assert b"[bold]x[/nonsense]" in shown
    assert b"[red]a1[/]: gone" in shown
    assert b"3/3" in shown


def test_nothing_is_loaded_to_draw_where_nothing_is_drawn() -> None:
    code = "import sys\nfrom contentfilter.cli.progress import progress\nwith progress('x', 2) as b: b.step()\n"
    code += "assert not any(m.split('.')[0] == 'rich' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.PIPE, timeout=WAIT)
