"""``contentfilter events-key``: a key pair for the event feed over the network.

The file gets the secret key and the mode 0600; the public key is printed. A file that is there is never written
again: then its public key is printed. Exit statuses: 0 printed; 1 the file could not be made; 78 it holds no key.
"""

import json

import click

from contentfilter.config.keys import public, read_secret, write_secret


@click.command("events-key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_context
def events_key(ctx: click.Context, as_json: bool, file: str) -> None:
    """Make FILE with a secret key, and print the public one.

    On the daemon's machine: name FILE in [events] key, and give the public key to those who shall listen. On
    theirs: make one too, and put its public key into the daemon's list, [events] clients.
    """
    made = True
    try:
        secret = write_secret(file)
    except FileExistsError:
        secret, made = read_secret(file), False
    except OSError as error:
        click.echo(f"contentfilter: {file}: cannot make it: {error.strerror}", err=True)
        ctx.exit(1)
    key = public(secret).decode("ascii")
    click.echo(json.dumps({"file": file, "public": key, "made": made}) if as_json else key)
