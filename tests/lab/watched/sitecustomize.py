"""Imported by Python at the start of each daemon under test: installs the watchdog of lab/watchdog.py."""

import importlib.util
import os
import sys
from pathlib import Path

if "CONTENTFILTER_LOOP_REPORT" in os.environ and "contentfilter.receiver" not in sys.orig_argv:
    _spec = importlib.util.spec_from_file_location("loop_watchdog", Path(__file__).parents[1] / "watchdog.py")
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    _module.install_in_daemon()
