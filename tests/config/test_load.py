"""contentfilter.toml: all problems, each with its line and in words; and a sample that is the defaults."""

import re
from pathlib import Path

import msgspec
import pytest

from contentfilter.config.load import DEFAULT_PATH, load_settings, read_settings
from contentfilter.errors import ConfigError
from contentfilter.settings import FaultRule, Settings

SAMPLE = Path(__file__).parents[2] / "etc" / "contentfilter.toml"
SECTIONS = {field.name: field.type for field in msgspec.structs.fields(Settings)}


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "contentfilter.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        settings, problems = read_settings(str(path))
        assert all(problem.path == str(path) for problem in problems)
        return settings, [(problem.line, problem.text) for problem in problems]

    return read


def test_the_sample_is_the_defaults():
    settings, problems = read_settings(str(SAMPLE))
    assert settings == Settings()
    assert problems == ()


@pytest.mark.parametrize("section", SECTIONS)
def test_the_sample_shows_and_explains_every_key(section):
    text = SAMPLE.read_text()
    (part,) = re.findall(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    shown = re.findall(
        rf"^(\w+) = |^# \[\[{section}\.(\w+)\]\]$", part, re.MULTILINE
    )  # or, as a comment, a list of tables
    assert ["".join(either) for either in shown] == list(SECTIONS[section].__struct_fields__)
    blocks = [block for block in part.strip().split("\n\n") if block]
    assert all(block.startswith("# ") for block in blocks), "a key without a comment"


@pytest.mark.parametrize(("section", "key"), [(s, k) for s, t in SECTIONS.items() for k in t.__struct_fields__])
def test_every_key_is_read_and_a_wrong_type_is_told_with_its_line(read, section, key):
    value = getattr(getattr(Settings(), section), key)
    as_toml = msgspec.json.encode(value).decode()
    assert read(f"[{section}]\n{key} = {as_toml}\n") == (Settings(), [])
    wrong = "1979-05-27"
    settings, problems = read(f"# one\n\n[{section}]\n# four\n{key} = {wrong}\n")
    assert settings == Settings()
    ((line, text),) = problems
    assert line == 5
    assert text.startswith(f"[{section}] {key}: expected ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('[clamd]\ntimeout = "5s"', '[clamd] timeout: expected a number > 0 and <= 86400, got a string "5s"'),
        ("[clamd]\ntimeout = true", "[clamd] timeout: expected a number > 0 and <= 86400, got true"),
        ("[clamd]\ntimeout = nan", "[clamd] timeout: expected a number > 0 and <= 86400, got nan"),
        ("[clamd]\ntimeout = -inf", "[clamd] timeout: expected a number > 0 and <= 86400, got -inf"),
        ("[spamd]\nreject_score = inf", "[spamd] reject_score: expected a number, got inf"),
        ("[clamd]\ntimeout = 0", "[clamd] timeout: expected a number > 0 and <= 86400, got 0"),
        ("[clamd]\nconcurrency = 1.5", "[clamd] concurrency: expected a whole number >= 1 and <= 100000, got 1.5"),
        ("[clamd]\nmax_size = -1", "[clamd] max_size: expected a whole number >= 0, got -1"),
        ('[clamd]\naction = "drop"', '[clamd] action: expected one of "mark", "reject", "remove", got a string "drop"'),
        ('[clamd]\nbackends = "x"', '[clamd] backends: expected a list of strings, got a string "x"'),
        ("[clamd]\nbackends = [1]", "[clamd] backends: expected a list of strings, got a list [1]"),
        ("[headers]\ntrace = 1", "[headers] trace: expected true or false, got 1"),
        ("[headers.trace]\nx = 1", "[headers] trace: expected true or false, got a section"),
        (
            '[listen]\nmode = "666"',
            '[listen] mode: expected a file mode as a string, such as "0660", got a string "666"',
        ),
        (
            '[tables]\nextension = "--"',
            '[tables] extension: expected a string of at most 1 character, got a string "--"',
        ),
        ("[clamd]\ntimeot = 5", "unknown key 'timeot' in [clamd]; did you mean 'timeout'?"),
        ("[calmd]\ntimeout = 5", "unknown section 'calmd'; did you mean 'clamd'?"),
        ("bakends = []", "unknown key 'bakends'; known are"),
        ("budget = 5", "unknown key 'budget'; it belongs into [service]"),
        ("timeout = 5", "[clamd] or [spamd]"),
        ("clamd = 5", "'clamd' is a section; write [clamd] on a line of its own"),
        ("[[clamd]]\ntimeout = 5", "'clamd' is a section"),
        ("[service]\nheartbeat = 20", "[service] stuck_after: 30 s is less than two heartbeats of 20 s"),
        ('[clamd]\nbackends = ["tcp:host"]', "[clamd] backends: 'tcp:host'"),
        ('[spamd]\nbackends = ["unix:relative"]', "[spamd] backends: 'unix:relative'"),
        ('[listen]\nsocket = "run/x"', '[listen] socket: expected an absolute path, got a string "run/x"'),
        (f'[listen]\nsocket = "/{"x" * 107}"', "has 108 bytes; a socket's path has at most 107"),
        (f'[service]\nrun = "/{"x" * 94}"', "has 108 bytes; a socket's path has at most 107"),
        ('[canary]\nhook = "contentfilter-queue"', "[canary] hook: expected an absolute path"),
        ("[canary]\nevery = 0.1", "[canary] every:"),
        ('[service]\nstate = "state"', "[service] state: expected an absolute path"),
        ('[tables]\nextension = "@"', "[tables] extension: '@' cannot separate an extension"),
        ('[spamd]\nsubject_tag = "a\\nBcc: x"', "[spamd] subject_tag: at most 100 printable"),
    ],
)
def test_what_is_wrong_is_said_in_words(read, line, says):
    _, problems = read(line)
    assert len(problems) == 1
    assert says in problems[0][1]


def test_a_path_of_exactly_the_limit_is_good(read):
    assert read(f'[listen]\nsocket = "/{"x" * 106}"')[1] == []


def test_all_problems_are_told_in_the_order_of_their_lines(read):
    text = """
[clamd]
backends = [
  "unix:/good",   # ] not the end
  "bad",
]
tiemout = '''
timeout = 1
'''
"timeout" = "x"

[log]  # [service]
level = \"\"\"
[spamd]\"\"\"

spamd.action = "x"
[spamd]
action = "y"
"""
    settings, problems = read(text)
    assert [line for line, _ in problems] == [3, 7, 10, 13, 16, 18]
    assert settings.clamd.timeout == Settings().clamd.timeout


def test_lists_over_several_lines_are_not_taken_for_sections(read):
    _, problems = read('[clamd]\nbackends = [\n["a"],\n]\ntimeout = "x"\n')
    assert [line for line, _ in problems] == [2, 5]


def test_dotted_keys_and_inline_tables_have_lines_too(read):
    _, problems = read('clamd.timeout = "x"\n\nspamd = { timeout = "y", action = "z" }\n')
    assert [line for line, _ in problems] == [1, 3, 3]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"[clamd]\ntimeout = \n", 2),
        (b"[clamd]\n\ntimeout 5\n", 3),
        (b"[clamd\n", 1),
        (b'[clamd]\n\naction = "x\n', 3),
        (b"[clamd]\ntimeout = 1\ntimeout = 2\n", 3),
        (b"[clamd]\n[log]\n[clamd]\n", 3),
        (b"[clamd]\n# \xff\n", 2),
        (b"[clamd]\nbackends = [\n\n", 2),
        (b"\x00", 1),
    ],
)
def test_bad_syntax_is_told_with_its_line(read, text, line):
    settings, ((found, said),) = read(text)
    assert found == line
    assert said.startswith("not ")
    assert settings == Settings()


def test_nesting_without_end_is_a_problem_not_a_crash(read):
    _, ((_, said),) = read("x = " + "[" * 100_000)
    assert said.startswith("not TOML")


def test_a_file_that_is_too_large_is_refused(read):
    assert "more than" in read(b"#" * (1 << 20) + b"\n")[1][0][1]


def test_warnings_do_not_forbid_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[service]\nbudget = 400\n[clamd]\ntimeout = 500\nconnect_timeout = 600\n")
    settings, problems = read_settings(str(path))
    assert [problem.line for problem in problems] == [2, 4, 5]
    assert all(problem.warning for problem in problems)
    assert load_settings(str(path)) == settings


def test_errors_forbid_it_and_all_are_carried(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[service]\nbudget = 400\nx = 1\n[clamd]\ny = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(str(path))
    assert [problem.line for problem in caught.value.problems] == [3, 5]


def test_only_the_default_file_may_be_missing(tmp_path):
    missing = str(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(missing)
    assert load_settings(missing, must_exist=False) == Settings()
    assert DEFAULT_PATH.startswith("/etc/")
    if not Path(DEFAULT_PATH).exists():
        assert load_settings(DEFAULT_PATH) == Settings()
        with pytest.raises(ConfigError):
            load_settings(DEFAULT_PATH, must_exist=True)


def test_a_directory_in_its_place_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read it"):
        load_settings(str(tmp_path))


# Rules of the failure table

RULE = """[failure]
clamd = "defer"

[[failure.rule]]
scanner = "clamd"
cause = ["down", "timeout"]
action = "pass"

[[failure.rule]] # the second
scanner = "clamd"
origin = "local"
action = "%s"
"""


def test_rules_are_read_with_one_word_or_several(read):
    settings, problems = read(RULE % "pass")
    assert problems == []
    assert settings.failure.rule == (
        FaultRule(action="pass", scanner="clamd", cause=("down", "timeout")),
        FaultRule(action="pass", scanner="clamd", origin="local"),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settings), type=Settings) == settings
    inline = 'failure.rule = [{scanner = "clamd", action = "pass"}, {cause = "down", action = "defer"}]'
    assert len(read(inline)[0].failure.rule) == 2


def test_the_commented_rule_of_the_sample_is_a_good_one(read):
    rule = SAMPLE.read_text().partition("# [[failure.rule]]\n")[2].partition("\n\n")[0]
    settings, problems = read("[[failure.rule]]\n" + rule.replace("# ", ""))
    assert problems == []
    assert settings.failure.rule == (
        FaultRule(action="pass", scanner="clamd", cause=("down", "timeout"), origin="authenticated"),
    )


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (RULE % "defer", 9, "[[failure.rule]] 2: contradicts [[failure.rule]] 1"),
        (RULE % "reject", 12, '[[failure.rule]] action: expected one of "defer", "pass", got a string "reject"'),
        ((RULE % "pass").replace('"down",', '"donw",'), 6, "[[failure.rule]] cause: expected one of"),
        ((RULE % "pass").replace('"local"', '"bypassed"'), 11, "[[failure.rule]] origin: expected one of"),
        ((RULE % "pass").replace("origin", "orgin"), 11, "did you mean 'origin'?"),
        ('[[failure.rule]]\nscanner = "clamd"\n', 1, "[[failure.rule]] action: it is missing"),
        ("[failure]\nrule = 3\n", 2, "[failure] rule: expected a list of tables"),
        ("[failure]\nrule = [3]\n", 2, "[failure] rule: expected a list of tables"),
        ('[[failure.rule]]\ncause = "down"\naction = "pass"\n' * 101, 1, "101 of them; at most 100"),
    ],
)
def test_what_is_wrong_in_a_rule_is_told_with_its_line(read, text, line, says):
    settings, ((where, told),) = read(text)
    assert where == line
    assert says in told
    assert settings.failure.rule == () or "contradicts" in told


def test_a_rule_without_effect_is_a_warning_and_the_file_can_be_used(tmp_path):
    path = tmp_path / "contentfilter.toml"
    path.write_text('[[failure.rule]]\norigin = "bounce"\naction = "pass"\n')
    assert load_settings(str(path)).failure.rule
    ((problem,),) = read_settings(str(path))[1:]
    assert (problem.line, problem.warning) == (1, True)
    assert "does nothing" in problem.text


@pytest.mark.parametrize(
    ("text", "line", "words", "warning"),
    [
        ('[clamd]\nbackends = ["tls:scan.example:3310"]\n', 2, "clamd speaks no TLS", False),
        ('[spamd]\nbackends = ["tls:scan.example"]\n', 2, "tls: needs a host", False),
        ('[spamd]\nbackends = ["ssl:scan.example:783"]\n', 2, "tls:host:port", False),
        ('[spamd]\n\ntls_ca = "ca.pem"\nbackends = ["tls:a:783"]\n', 3, "expected an absolute path", False),
        ('[spamd]\nbackends = ["tls:a:783"]\ntls_key = "/k"\n', 3, "a key needs its certificate", False),
        ('[spamd]\ntls_ca = "/ca"\n', 2, "has no effect", True),
    ],
)
def test_a_backend_or_certificate_that_cannot_be_is_told_with_its_line(
    tmp_path: Path, text: str, line: int, words: str, warning: bool
) -> None:
    path = tmp_path / "contentfilter.toml"
    path.write_text(text)
    problem = read_settings(str(path))[1][0]
    assert (problem.line, problem.warning) == (line, warning)
    assert words in problem.text
