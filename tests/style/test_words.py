"""One term for one thing: the terms that were replaced do not come back, and the English is a native engineer's."""

import ast
import functools
import re
from collections.abc import Iterator

import pytest
from style.tree import ROOT, relative, text_files

# Terms of former designs. Each was replaced by the term of the field: docs/architecture.md and docs/flow.md have those
# in use. No class, function, argument or attribute has such a name again. (Fields of public formats keep theirs.)
_TERMS = """
Recall Memory Kept Flight Late Pending Leave Left one_try Turns Line Ticket Claim Room Terms Guest SEATS Job Offered
Lookout Proof Surroundings Case Record Account Treatment Fate Finding Allowance Cell Entry Workbench Files Serving
Happened Remember Busy Asker Spread Orders Suspects Lane Mark Trouble Thing Inventory Effort FINISH FATAL
come_again turn_away floors resting doubtful movable converse kept_back on_fault painted tolerance apply_tolerance
tolerate expiry _went retire lacking _who bury glance keep_house chores believable things _sing own_words leave_out
left_out landed breakglass told
"""
TERMS = frozenset(_TERMS.split())

PHRASES = (
    r"left out", r"le(?:ave|aving) out", r"leaves out", r"(?:is|are|was|were|be|been) told", r"anew", r"whoever",
    r"at once", r"for good", r"what stands in", r"stands (?:in|there|for)", r"stood in", r"so many", r"comes to",
    r"any more", r"come again",
)  # fmt: skip
PHRASE = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)
IN_A_NAME = re.compile(r"_(?:told|anew|at_once|for_good|left_out|stands?_in|comes_to)(?:_|\b)|\b(?:told|anew)_")
QUESTION = re.compile(r"(?:What|Whether|How|Where|Who|Whose|Whom|That|All that|So many)\b")

# The history names what there was; this file has the lists. Corpus and messages are bytes as they came.
EXCEPT = {"CHANGELOG.md", "tests/style/test_words.py"}
SUFFIXES = {".py", ".md", ".c", ".h", ".toml", ".sh", ".service", ".8", ".5", ".7", ""}

# Rooms whose words are not yet revised. Remove a line when its room is.
REMAINING = (
    "SECURITY.md", "docs/", "etc/", "contentfilter/admin/doctor.py", "contentfilter/config/", "contentfilter/doors/",
    "contentfilter/monitor/", "contentfilter/policy/", "contentfilter/receiver/", "contentfilter/scanners/",
    "contentfilter/store/", "contentfilter/supervisor/", "contentfilter/tables/", "contentfilter/verdict/",
    "tests/bus/", "tests/config/", "tests/doors/", "tests/hook/", "tests/install/", "tests/monitor/", "tests/policy/",
    "tests/receiver/", "tests/scanners/", "tests/store/", "tests/supervisor/", "tests/tables/", "tests/verdict/",
    "tests/wire/",
)  # fmt: skip


def revised(place: str) -> bool:
    return not place.startswith(REMAINING)


@functools.cache
def lines() -> tuple[tuple[str, str], ...]:
    """Place and text of each line that the checks read."""
    return tuple(
        (f"{relative(path)}:{number}", line)
        for path in text_files()
        if relative(path) not in EXCEPT and path.suffix in SUFFIXES and "corpus" not in path.parts
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
    )


@functools.cache
def trees() -> tuple[tuple[str, ast.Module], ...]:
    """Place and syntax tree of each Python file."""
    paths = [path for path in text_files() if path.suffix == ".py" and relative(path) not in EXCEPT]
    return tuple((relative(path), ast.parse(path.read_text())) for path in paths)


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what a file defines: classes, functions, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_no_replaced_term_is_a_name_again() -> None:
    found = [f"{place}:{line}: {name}" for place, tree in trees() for line, name in defined(tree) if name in TERMS]
    assert list(filter(revised, found)) == []


def test_no_translated_phrase_is_anywhere() -> None:
    found = [f"{place}: {line.strip()}" for place, line in lines() if PHRASE.search(line) or IN_A_NAME.search(line)]
    assert list(filter(revised, found)) == []


def test_no_docstring_begins_with_a_question_word() -> None:
    found = []
    for place, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if QUESTION.match(text):
                    line = getattr(node, "lineno", 1)
                    found.append(f"{place}:{line}: {text.splitlines()[0]}")
    assert list(filter(revised, found)) == []


@pytest.mark.parametrize("room", REMAINING)
def test_a_room_that_is_not_revised_exists(room: str) -> None:
    assert (ROOT / room).exists()


def test_the_checks_read_the_repository_and_notice_words() -> None:
    assert len(lines()) > 30_000
    assert len(trees()) > 300
    assert set(defined(ast.parse("class Fate:\n    def glance(self, told): self.stray = 1"))) == {
        (1, "Fate"), (2, "glance"), (2, "self"), (2, "told"), (2, "stray"),
    }  # fmt: skip
    assert all(map(PHRASE.search, ("it is told", "Whoever asks", "all at once", "that stands in the log")))
    assert all(map(IN_A_NAME.search, ("def test_it_is_told()", "told_twice", "ends_at_once_now")))
    assert not any(map(PHRASE.search, ("a stand-in", "standing", "stands up", "hat oncetold")))
    assert QUESTION.match("Whether it runs.")
    assert not QUESTION.match("Whatever it is.")
