"""``contentfilter serve``: run the daemon in the foreground, as systemd and daemontools want it.

Exits with 78 and every problem on stderr when the configuration is bad, with 1 when the socket cannot be had.
"""

import asyncio
import os
import sys

import click

from contentfilter.app import Files, chores
from contentfilter.errors import ConfigError
from contentfilter.intake.listener import SocketError
from contentfilter.service.supervisor import Supervisor

EX_CONFIG = 78


@click.command()
@click.option("--workers", type=click.IntRange(1, 1024), help="Instead of service.workers.")
@click.option("--socket", "path", metavar="PATH", help="Instead of listen.socket.")
@click.pass_obj
def serve(config_path: str, workers: int | None, path: str | None) -> None:
    """Run the daemon: supervisor and workers.

    SIGTERM finishes the messages under way and ends, SIGHUP reads the configuration again.
    """
    sys.exit(run(Files(config_path, workers=workers, socket=path)))


def run(source: Files) -> int:
    """The exit status of the daemon."""
    try:
        return asyncio.run(Supervisor(source, "contentfilter.app:build", os.environ, chores()).run())
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"contentfilter: {problem}", err=True)
        return EX_CONFIG
    except SocketError as error:
        click.echo(f"contentfilter: {error}", err=True)
        return 1
