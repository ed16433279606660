"""One term for one thing: the terms that were replaced do not come back, and docstrings begin with a statement."""

import ast
import functools
import re

import pytest
from style.tree import modules, relative, text_files

# Identifiers of former designs. Each was replaced by the term of the field: see docs/flow.md for those in use.
NAMES = (
    "Recall", "Workbench", "Surroundings", "Lookout", "Guest", "come_again", "turn_away", "Serving", "Flight",
    "kept_back", "believable", "keep_house", "own_words", "leave_out", "Suspects", "bury", "Treatment", "Fate",
    "tolerate", "Allowance", "Happened", "Asker", "breakglass", "one_try", "on_fault",
    "FINISH", "SEATS", "left_out", "Effort", "converse", "apply_tolerance",
)  # fmt: skip

# Phrases that read as translated.
PHRASES = ("left out", "is told", "are told", "anew", "whoever", "for good", "what stands in")

# The history names what there was; this file has the lists. Corpus and messages are bytes as they came.
EXCEPT = {"CHANGELOG.md", "tests/style/test_words.py"}
SUFFIXES = {".py", ".md", ".c", ".h", ".toml", ".sh", ".service", ".8", ".5", ".7", ""}

QUESTIONS = re.compile(r"(?:What|Whether|How|Where|Who|Whose|Whom|That|All that|So many)\b")

# Remove this line when the work of all rooms is merged.
pytestmark = pytest.mark.xfail(reason="the rooms are being renamed one by one", strict=False)


@functools.cache
def lines() -> tuple[tuple[str, str], ...]:
    """Place and text of each line that the checks read."""
    return tuple(
        (f"{relative(path)}:{number}", line)
        for path in text_files()
        if relative(path) not in EXCEPT and path.suffix in SUFFIXES and "corpus" not in path.parts
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
    )


def found(word: re.Pattern[str], *, below: tuple[str, ...] = ("",)) -> list[str]:
    return [f"{place}: {line.strip()}" for place, line in lines() if place.startswith(below) and word.search(line)]


def test_no_replaced_name_comes_back() -> None:
    assert found(re.compile(rf"\b(?:{'|'.join(NAMES)})\b")) == []


def test_no_translated_phrase_is_in_the_package_or_the_documents() -> None:
    phrases = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)
    assert found(phrases, below=("contentfilter/", "docs/", "README.md", "etc/", "SECURITY.md")) == []


def test_no_docstring_of_the_package_begins_with_a_question_word() -> None:
    wrong = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if QUESTIONS.match(text):
                    wrong.append(f"{module.at(node)}: {text.splitlines()[0]}")
    assert wrong == []


def test_the_checks_read_the_repository_and_notice_words() -> None:
    assert len(lines()) > 30_000
    assert found(re.compile("contentfilter"), below=("README.md",))
    assert QUESTIONS.match("Whether it runs.")
    assert not QUESTIONS.match("Whatever it is.")
