"""Settings of ``contentfilter.toml``: every section, key, default and range.

The defaults here are the ones that ``etc/contentfilter.toml`` shows; a test compares the two.
Times are seconds, sizes are bytes. Nothing in this file reads a file or opens a socket.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0, le=86400)]
Size = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
VirusAction = Literal["reject", "remove", "mark"]
SpamAction = Literal["mark", "reject", "remove"]
FaultAction = Literal["defer", "pass"]
FaultScanner = Literal["signatures", "loadertypes", "clamd", "spamd"]
FaultCause = Literal["down", "timeout", "busy", "too-big", "limits", "bad-reply", "reloading", "memory", "poison"]
FaultOrigin = Literal["stranger", "relay", "authenticated", "local", "bounce"]
ClassAction = Literal["", "reject", "remove", "mark", "pass"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, and an unknown key is an error."""


class ListenSettings(Section, frozen=True):
    socket: str = "/run/contentfilter/queue.sock"
    mode: Annotated[str, Meta(pattern="^0[0-7]{3}$")] = "0666"  # all users that may run qmail-inject must reach it
    backlog: Count = 1024


class ServiceSettings(Section, frozen=True):
    workers: Annotated[int, Meta(ge=0, le=1024)] = 0  # 0: one per core
    budget: Seconds = 240.0  # for one message, all steps together
    max_in_flight: Count = 256  # simultaneous messages in one worker …
    max_in_flight_bytes: Size = 268_435_456  # … and all bytes of those above 256 KiB; one is always let in
    max_waiting: Annotated[int, Meta(ge=0, le=100_000)] = 1024  # in one worker, for a slot; more wait in the backlog
    admission_wait: Seconds = 30.0  # the longest wait for a slot; then the message is deferred
    max_message: Size = 1_073_741_824  # larger ones are deferred unopened
    memory_floor: Size = 67_108_864  # messages wait while less memory is available; 0: never
    disk_floor: Size = 67_108_864  # the same for the disk of the state directory
    drain: Seconds = 60.0  # after SIGTERM, for messages under way
    heartbeat: Seconds = 1.0
    stuck_after: Seconds = 30.0  # a worker that was silent for longer is replaced
    state: str = "/var/lib/contentfilter"
    run: str = "/run/contentfilter"
    control: str = "/var/qmail/control"  # qmail's control directory


class OriginSettings(Section, frozen=True):
    smtp_users: tuple[str, ...] = ("qmaild", "vpopmail")  # names or uids whose environment is believed
    bounce_users: tuple[str, ...] = ("qmails",)
    auth_variables: tuple[str, ...] = ("SMTPAUTHUSER", "SMTP_AUTH_USER", "AUTHUSER", "AUTHENTICATED=1")


class TableSettings(Section, frozen=True):
    source: Literal["files", "mariadb"] = "files"  # the text files in the control directory, or [mariadb]
    extension: Annotated[str, Meta(max_length=1)] = ""  # "-": user-ext@domain is also looked up as user@domain
    recipients: Literal["split", "strictest"] = "split"
    refresh: Seconds = 30.0  # how often the source is looked at for a change
    shrink_percent: Annotated[int, Meta(ge=1, le=100)] = 50  # a table that loses more than that …
    shrink_rows: Count = 100  # … and more rows than that waits for `contentfilter clients accept`


class MariaDbSettings(Section, frozen=True):
    """Location of the tables when ``[tables] source`` is ``"mariadb"``; MySQL works too."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 3306
    socket: str = ""  # a Unix socket, in place of host and port
    user: str = "contentfilter"
    password_file: str = ""  # its first line; this file never holds a password
    database: str = "contentfilter"
    tls: Literal["off", "verify", "unverified"] = "off"
    tls_ca: str = ""  # PEM; empty: the authorities that the system trusts
    tls_cert: str = ""  # our own certificate, where the server asks for one
    tls_key: str = ""
    connect_timeout: Seconds = 5.0  # connection, TLS and login together
    timeout: Seconds = 10.0  # the longest silence of the server
    load_timeout: Seconds = 60.0  # everything together
    clamav_table: str = "clamavclients"  # empty, and no query: the table has no rows
    clamav_columns: tuple[str, ...] = ("address", "exempt", "virus")  # "address=email": the column is named email
    spamd_table: str = "spamdclients"
    spamd_columns: tuple[str, ...] = ("address", "exempt", "spam", "score", "reject_score")
    clamav_query: str = ""  # a SELECT of the administrator's own, in place of table and columns
    spamd_query: str = ""
    updated_column: str = "updated_at"  # tells a change at the price of an index; empty: whole rows are summed up
    prefs_table: str = ""  # SpamAssassin's userpref: users in it have preferences; empty: none
    prefs_column: str = "username"
    prefs_query: str = ""  # the owners, in one column, in place of table and column
    fingerprint_query: str = ""  # one row that differs whenever the tables do


class SignatureSettings(Section, frozen=True):
    mode: Literal["mime", "compatible"] = "mime"
    formats: tuple[Literal["pe", "ne", "le", "elf", "macho"], ...] = ("pe",)  # found by their own headers, in mode mime
    action: VirusAction = "reject"
    thread_above: Size = 262_144  # larger messages are scanned off the event loop


class ClamdSettings(Section, frozen=True):
    backends: tuple[str, ...] = ("unix:/run/clamav/clamd.ctl",)
    concurrency: Count = 8  # simultaneous scans per backend and worker
    connect_timeout: Seconds = 5.0
    timeout_base: Seconds = 60.0  # one attempt: this and …
    timeout_per_megabyte: Annotated[float, Meta(ge=0, le=86400)] = 5.0  # … this for each 1,000,000 bytes …
    timeout: Seconds = 120.0  # … but never more
    max_wait: Seconds = 120.0  # the longest wait for a slot of a backend; then it is busy
    max_size: Size = 26_214_400  # clamd's MaxFileSize: above it clamd's OK means nothing
    proof: Annotated[float, Meta(ge=0, le=86400)] = (
        10.0  # seconds for which its OK is trusted after it has found a test virus; 0: always
    )
    action: VirusAction = "reject"


class SpamdSettings(Section, frozen=True):
    backends: tuple[str, ...] = ("tcp:127.0.0.1:783",)
    tls_ca: str = ""  # for tls:host:port. PEM; empty: the authorities that the system trusts
    tls_cert: str = ""  # our own certificate, where spamd asks for one
    tls_key: str = ""
    tls_name: str = ""  # in spamd's certificate; empty: the backend's host
    connect_timeout: Seconds = 5.0
    timeout_base: Seconds = 60.0  # one attempt: this and …
    timeout_per_megabyte: Annotated[float, Meta(ge=0, le=86400)] = 5.0  # … this for each 1,000,000 bytes …
    timeout: Seconds = 120.0  # … but never more
    max_wait: Seconds = 60.0  # the longest wait for a child; above 256 KiB a quarter of it; then it is busy
    max_size: Size = 268_435_456  # safety cap where samsgsize sets none
    user: Literal["table", "recipient", "none"] = "table"  # whose preferences spamd goes by
    max_users: Annotated[int, Meta(ge=1, le=30)] = 16  # owners of preferences for one message
    compress: bool = False
    action: SpamAction = "mark"
    reject_score: float = 0.0  # at or above it spam is refused whatever the action; 0: never
    subject_tag: str = ""  # e.g. "[SPAM] "; empty leaves the subject alone
    rewrite: Literal["headers", "full"] = "headers"  # HEADERS, or PROCESS with report_safe


class ReuseSettings(Section, frozen=True):
    """Stored answers of clamd and spamd for a retry, and scans that continue for it."""

    keep: Annotated[float, Meta(ge=0, le=3600)] = (
        900.0  # seconds for which an answer is valid; 0: none is stored or shared
    )
    slow: Annotated[float, Meta(ge=0, le=3600)] = 5.0  # answers that took longer are stored
    entries: Count = 1000  # answers in each worker
    late: Annotated[float, Meta(ge=0, le=3600)] = (
        300.0  # seconds that a scan may continue after its message was given up; 0: none
    )
    late_scans: Count = 8  # such scans in each worker


class ClassSettings(Section, frozen=True):
    """Action for a detection of clamd, by the class of its signature. Empty: the same as malware."""

    pua: ClassAction = ""  # possibly unwanted applications
    phishing: ClassAction = ""
    macro: ClassAction = ""
    encrypted: ClassAction = ""
    broken: ClassAction = ""
    structured: ClassAction = ""  # credit card and social security numbers
    unofficial: ClassAction = ""  # from databases that ClamAV does not sign


class FaultRule(Section, frozen=True):
    """Some cells of the failure table. A column that is omitted means all of its values."""

    action: FaultAction
    scanner: FaultScanner | tuple[FaultScanner, ...] = ()
    cause: FaultCause | tuple[FaultCause, ...] = ()
    origin: FaultOrigin | tuple[FaultOrigin, ...] = ()


class FailureSettings(Section, frozen=True):
    """Action for the message when a scanner fails: defer it, or pass it marked unchecked."""

    clamd: FaultAction = "defer"
    spamd: FaultAction = "pass"
    signatures: FaultAction = "defer"
    too_big: FaultAction = "pass"  # above a scanner's own limit
    limits: FaultAction = "pass"  # clamd or the signatures stopped at one of their limits
    poison: FaultAction = "defer"  # the message killed two workers
    patience: Seconds = 10.0  # all backends of a scanner unresponsive for so long: answer without waiting for them
    rule: tuple[FaultRule, ...] = ()  # single cells of the table; they go before the keys above


class HeaderSettings(Section, frozen=True):
    trace: bool = True  # X-ContentFilter on everything that passes
    scanned: bool = True  # X-Virus-Scanned, X-Virus-Status


class QuarantineSettings(Section, frozen=True):
    quota: Size = 1_073_741_824  # of everything in it; 0: no limit
    retention: Annotated[float, Meta(gt=0, le=3650)] = 30.0  # days
    protect: Annotated[float, Meta(ge=0, le=3650)] = 1.0  # days; what is younger never makes room: new mail is deferred


class JournalSettings(Section, frozen=True):
    enabled: bool = True
    retention: Annotated[float, Meta(gt=0, le=3650)] = 30.0  # days
    max_size: Annotated[int, Meta(ge=1_048_576)] = 1_073_741_824  # about 2,000 bytes for a message


class HttpSettings(Section, frozen=True):
    listen: str = "127.0.0.1:9464"  # "address:port", or "off"
    page: Literal["off", "on"] = "off"  # the status page for a browser: it shows addresses


class EventSettings(Section, frozen=True):
    """The event feed over the network. On this machine it is always there, in the run directory."""

    listen: str = "off"  # "tcp://address:port"
    key: str = ""  # a file with our secret key
    clients: str = ""  # a file with the public keys of those who may listen


class CanarySettings(Section, frozen=True):
    """Samples that go through the hook as mail does, to see that it is scanned."""

    enabled: bool = True  # where a hook is found
    every: Annotated[float, Meta(ge=1, le=86400)] = 60.0  # seconds from the start of one round to the next
    hook: str = ""  # empty: bin/qmail-queue beside the control directory if it is the hook, else the packaged one
    conf: str = "/etc/contentfilter/queue.conf"  # its configuration; it names the socket that mail goes to


class LogSettings(Section, frozen=True):
    to: Literal["stderr", "syslog"] = "stderr"
    socket: str = "/dev/log"  # of syslog
    format: Literal["json", "logfmt"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Section, frozen=True):
    """The whole file. One table per section."""

    listen: ListenSettings = msgspec.field(default_factory=ListenSettings)
    service: ServiceSettings = msgspec.field(default_factory=ServiceSettings)
    origin: OriginSettings = msgspec.field(default_factory=OriginSettings)
    tables: TableSettings = msgspec.field(default_factory=TableSettings)
    mariadb: MariaDbSettings = msgspec.field(default_factory=MariaDbSettings)
    signatures: SignatureSettings = msgspec.field(default_factory=SignatureSettings)
    clamd: ClamdSettings = msgspec.field(default_factory=ClamdSettings)
    spamd: SpamdSettings = msgspec.field(default_factory=SpamdSettings)
    reuse: ReuseSettings = msgspec.field(default_factory=ReuseSettings)
    classes: ClassSettings = msgspec.field(default_factory=ClassSettings)
    failure: FailureSettings = msgspec.field(default_factory=FailureSettings)
    headers: HeaderSettings = msgspec.field(default_factory=HeaderSettings)
    quarantine: QuarantineSettings = msgspec.field(default_factory=QuarantineSettings)
    journal: JournalSettings = msgspec.field(default_factory=JournalSettings)
    http: HttpSettings = msgspec.field(default_factory=HttpSettings)
    events: EventSettings = msgspec.field(default_factory=EventSettings)
    canary: CanarySettings = msgspec.field(default_factory=CanarySettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)
