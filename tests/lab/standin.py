"""The strict stand-in for qmail-queue (standin.c): built once, and what it recorded."""

from dataclasses import dataclass
from pathlib import Path

from lab.compiler import compiled

from contentfilter.model import Envelope
from contentfilter.wire import envelope

SOURCE = Path(__file__).with_name("standin.c")


def build(directory: Path) -> Path:
    """Compile the stand-in into ``directory`` if it is missing there."""
    return compiled(directory, "standin", ["cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-static", SOURCE])


@dataclass(frozen=True, slots=True)
class Queued:
    """One complete submission: what qmail-queue would have put into the queue, and how it was started."""

    pid: int
    ppid: int
    uid: int
    message: bytes
    envelope_bytes: bytes
    arguments: tuple[str, ...]
    environ: dict[str, str]
    descriptors: dict[int, str]  # open when it started: number -> what it is

    @property
    def envelope(self) -> Envelope:
        return envelope.parse(self.envelope_bytes)


class Standin:
    """The program and the directory where it records."""

    def __init__(self, program: Path, directory: Path) -> None:
        self.program = program
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o1777)

    def environ(self, **knobs: str) -> dict[str, str]:
        """Variables that make it record; ``knobs`` are the fault knobs without their prefix (``exit="53"``)."""
        return {"STANDIN_DIR": str(self.directory)} | {f"STANDIN_{k.upper()}": v for k, v in knobs.items()}

    def queued(self) -> list[Queued]:
        """All complete submissions, in the order in which their processes were started."""
        paths = sorted(self.directory.glob("*.msg"), key=lambda path: path.stat().st_mtime_ns)
        found = [self._read(path) for path in paths]
        most = int(Path("/proc/sys/kernel/pid_max").read_text())  # after which the numbers restart
        return sorted(found, key=lambda queued: (queued.pid - found[0].ppid) % most)

    def leftovers(self) -> list[str]:
        """Files of submissions that were begun and not finished."""
        return sorted(path.name for path in self.directory.glob("*.tmp"))

    def stalled(self) -> list[int]:
        """Processes that the knob STALL holds."""
        return [int(path.stem) for path in self.directory.glob("*.stalled")]

    def _read(self, message: Path) -> Queued:
        lines = message.with_suffix(".info").read_bytes().decode(errors="surrogateescape").split("\0")
        parts = [line.partition(" ")[::2] for line in lines if line]
        numbers = {key: int(value) for key, value in parts if key in ("pid", "ppid", "uid")}
        variables = [value.partition("=")[::2] for key, value in parts if key == "env"]
        opened = [value.partition(" ")[::2] for key, value in parts if key == "fd"]
        return Queued(
            **numbers,
            message=message.read_bytes(),
            envelope_bytes=message.with_suffix(".env").read_bytes(),
            arguments=tuple(value for key, value in parts if key == "arg"),
            environ=dict(variables),
            descriptors={int(number): target for number, target in opened},
        )
