"""Validator for etc/log-schema.json: the few keywords of JSON Schema that the file uses.

Stricter in one point: a field that the schema does not name is wrong.
"""

import re
from typing import Any

_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def wrong(line: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """Everything that is not as the schema says."""
    found = list(_wrong(line, schema, schema, "line"))
    event = schema["if"]["properties"]["event"]["const"]
    if line.get("event") == event:
        found += [f"{event} without {name}" for name in schema["then"]["required"] if name not in line]
    return found


def _wrong(value: Any, about: dict[str, Any], schema: dict[str, Any], where: str) -> list[str]:
    if "$ref" in about:
        about = schema["$defs"][about["$ref"].rpartition("/")[2]]
    kinds = about["type"] if isinstance(about["type"], list) else [about["type"]]
    if not any(_is(value, kind) for kind in kinds):
        return [f"{where} is {value!r}, not {kinds}"]
    if "enum" in about and value not in about["enum"]:
        return [f"{where} is {value!r}"]
    if "pattern" in about and not re.search(about["pattern"], value):
        return [f"{where} is {value!r}"]
    found = []
    if isinstance(value, list) and "items" in about:
        for number, each in enumerate(value):
            found += _wrong(each, about["items"], schema, f"{where}[{number}]")
    if isinstance(value, dict) and "properties" in about:
        found += [f"{where} without {name}" for name in about["required"] if name not in value]
        for name, each in value.items():
            if name not in about["properties"]:
                found.append(f"{where}.{name} is not in the schema")
            else:
                found += _wrong(each, about["properties"][name], schema, f"{where}.{name}")
    return found


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
