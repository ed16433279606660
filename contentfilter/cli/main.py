"""``contentfilter``: one command, its sub-commands loaded only when they are called.

Exit statuses: 0 done; 1 the answer is no (a check failed, nothing found); 2 wrong usage;
70 internal error; 78 configuration error (sysexits).
"""

import importlib
from typing import Any

import click
from click.shell_completion import CompletionItem

from contentfilter import __version__
from contentfilter.config import DEFAULT_PATH
from contentfilter.errors import ConfigError

EX_CONFIG = 78

# name -> (module, attribute, one line of help). The help stands here so that --help imports nothing.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "serve": ("contentfilter.cli.serve", "serve", "Run the daemon: supervisor and workers."),
    "check": ("contentfilter.cli.check", "check", "Validate everything that serve would read."),
    "showctl": ("contentfilter.cli.showctl", "showctl", "Print H-Sphere's parameters in qmail-showctl's form."),
    "explain": ("contentfilter.cli.explain", "explain", "Say what would happen to a message, and why."),
    "why": ("contentfilter.cli.why", "why", "Say what happened to a message, and why."),
    "clients": ("contentfilter.cli.clients", "clients", "List and change the recipient tables."),
    "allow": ("contentfilter.cli.allow", "allow", "Let a signature pass for a while."),
    "quarantine": ("contentfilter.cli.quarantine", "quarantine", "Look at, release and remove what was kept."),
    "status": ("contentfilter.cli.status", "status", "Say whether mail flows, and what is wrong."),
    "top": ("contentfilter.cli.top", "top", "Watch it: rates, scanners, workers, the last decisions."),
    "tail": ("contentfilter.cli.tail", "tail", "Print what happens to mail, as it happens."),
    "reload": ("contentfilter.cli.control", "reload", "Make the daemon read its configuration again."),
    "bypass": ("contentfilter.cli.bypass", "bypass", "Leave a scanner out for a while, when mail must flow."),
    "drain": ("contentfilter.cli.bypass", "drain", "Finish the messages under way and accept no more."),
    "resume": ("contentfilter.cli.bypass", "resume", "Accept mail again, after drain."),
    "failures": ("contentfilter.cli.failures", "failures", "Say what each fault of a scanner does to mail."),
    "doctor": ("contentfilter.cli.doctor", "doctor", "Say what is wrong with this server, and what to do about it."),
    "canary": ("contentfilter.cli.canary", "canary", "See that mail is scanned: send samples through the hook."),
    "hook": ("contentfilter.cli.hook", "hook", "Install the hook in a qmail, remove it, show its state."),
    "migrate": ("contentfilter.cli.migrate", "migrate", "Turn the controls of H-Sphere or simscan into ours."),
    "events-key": ("contentfilter.cli.events_key", "events_key", "A key pair for the event feed over the network."),
    "spamd-options": ("contentfilter.cli.spamd_options", "spamd_options", "Print what spamd must be started with."),
    "install": ("contentfilter.cli.install", "install", "Set the server up: user, directories, units, manual pages."),
    "uninstall": ("contentfilter.cli.install", "uninstall", "Undo what install did."),
    "completion": ("contentfilter.cli.completion", "completion", "Print the completion script for a shell."),
}


class Lazy(click.Group):
    """A group that imports a sub-command's module only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and options, without importing any command."""
        found = [
            CompletionItem(name, help=text) for name, (_, _, text) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the sub-command; configuration errors of all of them are told here."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            for problem in error.problems:
                click.echo(f"contentfilter: {problem}", err=True)
            ctx.exit(EX_CONFIG)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not ctx.resilient_parsing:  # not while a shell completes
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"no such command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    default=DEFAULT_PATH,
    show_default=True,
    help="The settings. A missing default file means the built-in defaults.",
)
@click.version_option(__version__, prog_name="contentfilter")
@click.pass_context
def cli(ctx: click.Context, config_path: str) -> None:
    """Content filter for qmail: looks at each message before qmail-queue does."""
    ctx.obj = config_path


def main() -> Any:
    """Entry point of the installed command."""
    return cli(prog_name="contentfilter")
