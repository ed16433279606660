"""Generator of contentfilter.toml(5) from the commented sample: each comment becomes the text of the keys below it.

    toml_page.py etc/contentfilter.toml >contentfilter.toml.5

A test compares the sample with the settings, so the page is consistent with them. Run by the build.
"""

import re
import sys
import textwrap
from pathlib import Path

HEAD = """\
.\\" Generated from etc/contentfilter.toml by tools/toml_page.py.
.Dd November 20, 2026
.Dt CONTENTFILTER.TOML 5
.Os
.Sh NAME
.Nm contentfilter.toml
.Nd settings of the content filter for qmail
.Sh DESCRIPTION
"""

FOOT = """\
.Sh FILES
.Bl -tag -width Ds
.It Pa /etc/contentfilter/contentfilter.toml
read by
.Xr contentfilter 8 ,
unless
.Fl -config
names another file
.El
.Sh SEE ALSO
.Xr contentfilter 8 ,
.Xr contentfilter-queue 8
"""

_KEY = re.compile(r"#?([a-z][a-z0-9_]*) = (.*)")
_TABLES = re.compile(r"# (\[\[[a-z.]+\]\])")


def escaped(text: str) -> str:
    r"""Escape a text line for mdoc: no accidental escapes, no line that looks like a macro."""
    text = text.replace("\\", "\\e").replace('"', "\\(dq").replace("'", "\\(aq")
    text = re.sub("`([^`]*)`", r"\\(oq\1\\(cq", text)
    return "\\&" + text if text.startswith(".") else text


def paragraphs(comment: list[str]) -> list[str]:
    """The comment as mdoc text, one sentence per line as mandoc likes it."""
    lines: list[str] = []
    for block in "\n".join(comment).split("\n\n"):
        if lines:
            lines.append(".Pp")
        text = re.sub(r"(?<=[a-z0-9)\"`\]][.?]) (?=[A-Z\"`])", "\n", " ".join(block.split()))
        for sentence in filter(None, text.split("\n")):
            lines += [
                escaped(line) for line in textwrap.wrap(sentence, 64, break_long_words=False, break_on_hyphens=False)
            ]
    return lines


def page(sample: str) -> str:
    """The whole manual page."""
    out: list[str] = []
    comment: list[str] = []
    head, _, body = sample.partition("\n[")
    out += paragraphs([line.removeprefix("#").strip() for line in head.splitlines()])
    open_list = literal = False
    for line in ("[" + body).splitlines():
        if literal:  # an example of a list of tables, up to the empty line
            out.append(escaped(line.removeprefix("#").strip()) if line else ".Ed")
            literal = bool(line)
        elif line.startswith("["):
            out += [".El"] if open_list else []
            out += [f".Ss \\&{line.strip()}\\&"]
            open_list, comment = False, []
        elif match := _KEY.fullmatch(line):
            if not open_list:
                out.append(".Bl -tag -width Ds")
                open_list = True
            out.append(f".It Ic {match[1]} No = {escaped(match[2])}")
            out += paragraphs(comment)
            comment = []
        elif match := _TABLES.fullmatch(line):
            out += [f".It Ic \\&{match[1]}\\&", *paragraphs(comment), ".Bd -literal -offset indent", match[1]]
            comment, literal = [], True
        elif line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif not line and comment and not open_list:
            out += paragraphs(comment)  # describes the whole section
            comment = []
    out += [".El"] if open_list else []
    return HEAD + "\n".join(out) + "\n" + FOOT


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1]).read_text()))
