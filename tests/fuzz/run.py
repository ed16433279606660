"""Fuzz one target: ``run.py TARGET [libFuzzer's options] CORPUS...`` (``make fuzz`` does it for all).

Needs atheris. The product's modules are instrumented as they are imported, so that new branches are noticed.
"""

import sys

import atheris

with atheris.instrument_imports(include=["contentfilter"]):
    from fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
