"""``contentfilter events-key``: create a key pair for the event feed over the network.

The secret key is written to the file with mode 0600, and the public key is printed. An existing file is not changed,
and its public key is printed. Exit statuses: 0 printed; 1 the file could not be created; 78 it contains no key.
"""

import json

import click

from contentfilter.config.keys import public, read_secret, write_secret


@click.command("events-key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_context
def events_key(ctx: click.Context, as_json: bool, file: str) -> None:
    """Create FILE with a secret key, and print the public key.

    On the daemon's machine: set [events] key to FILE, and give the public key to the clients. On a client: create
    another one, and add its public key to the daemon's list, [events] clients.
    """
    made = True
    try:
        secret = write_secret(file)
    except FileExistsError:
        secret, made = read_secret(file), False
    except OSError as error:
        click.echo(f"contentfilter: {file}: cannot create it: {error.strerror}", err=True)
        ctx.exit(1)
    key = public(secret).decode("ascii")
    click.echo(json.dumps({"file": file, "public": key, "made": made}) if as_json else key)
