"""``contentfilter spamd-options``: options that spamd must be started with, from the control files.

``spamdchildren`` and ``sanetcheck`` are options of spamd; the daemon only observes the first. spamd uses the last of
repeated options, and ``--nolocal`` overrides ``--local`` (spamd(8p)).
"""

import asyncio

import click

from contentfilter.config.controls import read_controls
from contentfilter.config.load import load_settings

UNIT = """\
# Written by `contentfilter spamd-options --systemd` from spamdchildren and sanetcheck, for Debian's spamd.service.
# After $OPTIONS of /etc/default/spamd, to override it. Create it again when one of the two changes:
#
#   mkdir -p /etc/systemd/system/spamd.service.d
#   contentfilter spamd-options --systemd >/etc/systemd/system/spamd.service.d/contentfilter.conf
#   systemctl daemon-reload && systemctl restart spamd
[Service]
ExecStart=
ExecStart=/usr/sbin/spamd --pidfile=/run/spamd.pid $OPTIONS {options}
"""


@click.command(name="spamd-options")
@click.option("--systemd", is_flag=True, help="Print a drop-in for spamd.service.")
@click.pass_obj
def spamd_options(config_path: str, systemd: bool) -> None:
    """Print the spamd options that correspond to spamdchildren and sanetcheck."""
    controls, problems = asyncio.run(read_controls(load_settings(config_path).service.control))
    for problem in problems:
        click.echo(f"contentfilter: {problem}", err=True)
    options = as_options(controls.values["spamdchildren"], network=controls.values["sanetcheck"])
    click.echo(UNIT.format(options=options) if systemd else options, nl=not systemd)


def as_options(children: int, *, network: bool) -> str:
    return f"--max-children {children} {'--nolocal' if network else '--local'}"
