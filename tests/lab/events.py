"""Log lines as the source has them: every call of a logger with its event, its level and its fields.

As a program it brings the tables in docs/logs.md and the events in etc/log-schema.json up to date:
``PYTHONPATH=.:tests python -m lab.events``. New fields are described in the schema by hand.
"""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contentfilter
from contentfilter.log import EVENTS
from contentfilter.verdict.record import MailRecord

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "etc" / "log-schema.json"

LEVELS = ("debug", "info", "warning", "error", "exception")


@dataclass
class Said:
    """Levels and fields of one event."""

    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    more: bool = False  # ``**something``: fields that the call does not name


def said() -> dict[str, Said]:
    """By event. Its name is a literal in a call that logs or makes the event, and is never assembled."""
    found: dict[str, Said] = {}
    for path in sorted(Path(contentfilter.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name, method = node.args[0], node.func
            if not isinstance(method, ast.Attribute) or not ast.unparse(method.value).endswith("log"):
                if (
                    isinstance(name, ast.Constant) and name.value in EVENTS
                ):  # an event that is made here, and logged elsewhere
                    found.setdefault(name.value, Said()).more = True
                continue
            if method.attr not in LEVELS:
                continue
            if ast.unparse(name) == "event.name":
                continue
            assert isinstance(name, ast.Constant), f"{path.name}:{node.lineno}: event names are fixed"
            event = found.setdefault(str(name.value), Said())
            raised = method.attr == "exception"
            event.levels.add("error" if raised else method.attr)
            event.fields |= {"exception"} if raised else set()
            event.fields |= {keyword.arg for keyword in node.keywords if keyword.arg}
            event.more |= any(keyword.arg is None for keyword in node.keywords)
    return found


# Fields that the calls do not name.
MORE: dict[str, set[str]] = {
    "mail.done": set(MailRecord.__struct_fields__),
    "housekeeping.done": {"entries", "stray", "used", "messages"},
    "tables.stale": {"loaded", "clamav_rows", "spamd_rows"},
    "tables.current": {"loaded", "clamav_rows", "spamd_rows"},
    "python.log": {"logger", "text", "exception"},
}
COMMON = ("time", "level", "event", "pid", "worker", "lines_lost", "cut")
_BYPASS = {"scanner", "origins", "since", "until", "by", "reason"}
_DRAIN = {"since", "until", "by", "reason"}
for _when, _also in (("begin", set()), ("active", {"left"}), ("end", {"ended"})):
    MORE[f"bypass.{_when}"] = _BYPASS | _also
    MORE[f"drain.{_when}"] = _DRAIN | (_also - {"left"})


def fields_of(event: str, source: dict[str, Said]) -> set[str]:
    """Fields that a line of that event may have beside the common ones."""
    return source.get(event, Said()).fields | MORE.get(event, set())


def schema() -> dict[str, Any]:
    """etc/log-schema.json."""
    return json.loads(SCHEMA.read_text())  # type: ignore[no-any-return]


def document() -> str:
    """docs/logs.md as it should be: its two tables by the source and the schema, the rest as it is."""
    text, source, properties = (ROOT / "docs" / "logs.md").read_text(), said(), schema()["properties"]
    events = "| event | levels | fields | meaning |\n|---|---|---|---|\n"
    for name, meaning in sorted(EVENTS.items()):
        levels = ", ".join(level for level in LEVELS if level in source.get(name, Said()).levels) or "any"
        fields = ", ".join(f"`{each}`" for each in sorted(fields_of(name, source)))
        events += f"| `{name}` | {levels} | {fields} | {meaning} |\n"
    fields = "| field | type | meaning |\n|---|---|---|\n"
    for name, about in sorted(properties.items()):
        fields += f"| `{name}` | {type_of(about)} | {about['description']} |\n"
    for heading, table in (("Events", events), ("Fields", fields)):
        text = re.sub(rf"(?<=\n## {heading}\n\n)(?:\|.*\n)*", lambda _, table=table: table, text, count=1)
    return text


def type_of(about: dict[str, Any]) -> str:
    kind = about.get("type", "string")
    return " or ".join([kind] if isinstance(kind, str) else kind)


def schema_text() -> str:
    """etc/log-schema.json with the events of the source. Fields and their meanings are written by hand."""
    text = SCHEMA.read_text()
    return re.sub(
        r'("event": [{][^}]*"enum": )\[[^]]*\]', lambda found: found[1] + json.dumps(sorted(EVENTS)), text, count=1
    )


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
    (ROOT / "docs" / "logs.md").write_text(document())
