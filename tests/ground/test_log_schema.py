"""docs/logs.md and etc/log-schema.json say what the source does: every event, every field, every type."""

import msgspec
from lab.events import COMMON, document, fields_of, said, schema
from lab.schema import wrong

from contentfilter.log import EVENTS
from contentfilter.log_target import SEVERITIES
from contentfilter.verdict.record import MailRecord, ScanRecord


def test_the_tables_of_the_document_are_those_of_the_source() -> None:
    from lab.events import ROOT

    assert (ROOT / "docs" / "logs.md").read_text() == document(), "run: PYTHONPATH=.:tests python -m lab.events"


def test_the_schema_knows_every_event_and_every_field_and_no_other() -> None:
    properties, source = schema()["properties"], said()
    assert properties["event"]["enum"] == sorted(EVENTS), "run: PYTHONPATH=.:tests python -m lab.events"
    assert set(properties["level"]["enum"]) == set(SEVERITIES)
    used = set(COMMON).union(*(fields_of(event, source) for event in EVENTS))
    assert used - set(properties) == set(), "describe them in etc/log-schema.json"
    assert set(properties) - used == set(), "nothing logs these"


def test_the_schema_has_the_types_of_the_record() -> None:
    ours, defs = schema(), msgspec.json.schema(MailRecord)["$defs"]
    assert ours["then"]["required"] == list(MailRecord.__struct_fields__)
    for name, about in defs["MailRecord"]["properties"].items():
        assert ours["properties"][name]["type"] == about["type"], name
    scan = ours["$defs"]["scan"]
    assert scan["required"] == defs["ScanRecord"]["required"]
    assert list(scan["properties"]) == list(ScanRecord.__struct_fields__)
    for name, about in defs["ScanRecord"]["properties"].items():
        types = [each["type"] for each in about["anyOf"]] if "anyOf" in about else about["type"]
        assert scan["properties"][name]["type"] == types, name


def test_the_check_of_lines_finds_what_is_wrong() -> None:
    good = {"time": "2026-11-21T03:04:05.678901Z", "level": "info", "event": "service.ready", "workers": 2}
    assert wrong(good, schema()) == []
    for change in (
        {"workers": "2"}, {"workers": True}, {"event": "no.such"}, {"level": "bad"}, {"time": "now"}, {"new": 1},
        {"event": "mail.done"}, {"scans": [{"scanner": "clamd"}]}, {"results": "0+"},
    ):  # fmt: skip
        assert wrong(good | change, schema()) != [], change
