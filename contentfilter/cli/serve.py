"""``contentfilter serve``: run the daemon in the foreground, as systemd and daemontools want it.

Exits with 78 and every problem on stderr when the configuration is bad, with 77 when started as root without being
told to, with 1 when the socket cannot be had.
"""

import asyncio
import os
import sys

import click

from contentfilter.doors.listening_socket import SocketError
from contentfilter.errors import ConfigError
from contentfilter.hardening import give_up_privileges
from contentfilter.supervisor.maintenance import maintenance_jobs
from contentfilter.supervisor.source import ConfigLoader
from contentfilter.supervisor.supervisor import Supervisor

EX_NOPERM, EX_CONFIG = 77, 78
WORKER = (sys.executable, "-P", "-m", "contentfilter.worker")  # -P: nothing is imported from the current directory
AS_ROOT = (
    "contentfilter: serve does not run as root, because it reads what strangers send. Start it as the user"
    " contentfilter (contentfilter install makes the user and a unit or run script that switches to it)"
    ", or say --allow-root."
)


@click.command()
@click.option("--workers", type=click.IntRange(1, 1024), help="Instead of service.workers.")
@click.option("--socket", "path", metavar="PATH", help="Instead of listen.socket.")
@click.option("--allow-root", is_flag=True, help="Run even as root.")
@click.pass_obj
def serve(config_path: str, workers: int | None, path: str | None, allow_root: bool) -> None:
    """Run the daemon: supervisor and workers.

    SIGTERM finishes the messages under way and ends, SIGHUP reads the configuration again.
    """
    if os.geteuid() == 0 and not allow_root:
        click.echo(AS_ROOT, err=True)
        sys.exit(EX_NOPERM)
    give_up_privileges()
    sys.exit(run(ConfigLoader(config_path, workers=workers, socket=path)))


def run(source: ConfigLoader) -> int:
    """The exit status of the daemon."""
    try:
        return asyncio.run(Supervisor(source, WORKER, os.environ, maintenance_jobs()).run())
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"contentfilter: {problem}", err=True)
        return EX_CONFIG
    except SocketError as error:
        click.echo(f"contentfilter: {error}", err=True)
        return 1
