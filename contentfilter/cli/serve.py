"""``contentfilter serve``: run the daemon in the foreground, for systemd or daemontools.

Exit statuses: 78 the configuration is invalid (all problems are on standard error); 77 started as root without
--allow-root; 1 the socket cannot be created.
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
WORKER = (sys.executable, "-P", "-m", "contentfilter.worker")  # -P: no imports from the current directory
AS_ROOT = (
    "contentfilter: serve does not run as root, because it reads mail from strangers. Start it as the user"
    " contentfilter (contentfilter install creates the user and a unit or run script that switches to it)"
    ", or use --allow-root."
)


@click.command()
@click.option("--workers", type=click.IntRange(1, 1024), help="Number of workers, in place of service.workers.")
@click.option("--socket", "path", metavar="PATH", help="Socket of the hook, in place of listen.socket.")
@click.option("--allow-root", is_flag=True, help="Allow the daemon to run as root.")
@click.pass_obj
def serve(config_path: str, workers: int | None, path: str | None, allow_root: bool) -> None:
    """Run the daemon: supervisor and workers.

    On SIGTERM it finishes the messages in progress and ends; on SIGHUP it reloads the configuration.
    """
    if os.geteuid() == 0 and not allow_root:
        click.echo(AS_ROOT, err=True)
        sys.exit(EX_NOPERM)
    give_up_privileges()
    sys.exit(run(ConfigLoader(config_path, workers=workers, socket=path)))


def run(source: ConfigLoader) -> int:
    """Run the daemon. Returns its exit status."""
    try:
        return asyncio.run(Supervisor(source, WORKER, os.environ, maintenance_jobs()).run())
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"contentfilter: {problem}", err=True)
        return EX_CONFIG
    except SocketError as error:
        click.echo(f"contentfilter: {error}", err=True)
        return 1
