"""Fuzz targets: one function for each format, which takes any bytes and asserts.

Three things are looked at beside "only the documented errors": what was read can be written and read again, two
readers of one format agree (the hook's in C and the daemon's in Python; one feed and many), and what people or a
client get to see holds no line end. ``make fuzz`` feeds these functions; the tests feed them the corpus.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fuzz import files, mail, wire

Target = Callable[[bytes], None]

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.__name__: target
        for target in (
            wire.request,
            wire.answer,
            wire.report,
            wire.envelopes,
            wire.clamd_answer,
            wire.spamd_response,
            wire.spam_fields,
            wire.frame,
            mail.scan,
            mail.decoders,
            mail.header_lines,
            mail.marks,
            files.table,
            files.controls,
            files.rules,
            files.toml,
            files.sidecar,
            files.queue_conf,
        )
    }
)
