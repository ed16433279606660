"""``contentfilter``: command group; the module of a sub-command is imported only when it runs.

Exit statuses: 0 success; 1 failure or a negative answer (a check failed, nothing found); 2 wrong usage;
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

# name -> (module, attribute, one line of help). The help is here so that --help imports nothing.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "serve": ("contentfilter.cli.serve", "serve", "Run the daemon: supervisor and workers."),
    "check": (
        "contentfilter.cli.check",
        "check",
        "Validate all configuration files that the daemon and the hook read.",
    ),
    "showctl": ("contentfilter.cli.showctl", "showctl", "Print H-Sphere's parameters in the format of qmail-showctl."),
    "explain": ("contentfilter.cli.explain", "explain", "Explain what would happen to a message."),
    "why": ("contentfilter.cli.why", "why", "Explain what happened to a message."),
    "clients": ("contentfilter.cli.clients", "clients", "List and change the recipient tables."),
    "allow": ("contentfilter.cli.allow", "allow", "Let a signature pass for a limited time."),
    "quarantine": ("contentfilter.cli.quarantine", "quarantine", "List, release and delete quarantined mail."),
    "status": ("contentfilter.cli.status", "status", "Show whether mail is flowing, and current problems."),
    "top": ("contentfilter.cli.top", "top", "Live view: rates, scanners, workers, latest decisions."),
    "tail": ("contentfilter.cli.tail", "tail", "Follow decisions about mail as they are made."),
    "reload": ("contentfilter.cli.control", "reload", "Reload the configuration of the daemon."),
    "bypass": ("contentfilter.cli.bypass", "bypass", "Skip a scanner for a limited time, when mail must flow."),
    "drain": ("contentfilter.cli.bypass", "drain", "Finish the messages in progress and accept no new ones."),
    "resume": ("contentfilter.cli.bypass", "resume", "Accept mail again, after drain."),
    "failures": ("contentfilter.cli.failures", "failures", "Show what each failure of a scanner does to mail."),
    "doctor": ("contentfilter.cli.doctor", "doctor", "Check this server and suggest a remedy for each fault."),
    "canary": ("contentfilter.cli.canary", "canary", "Send samples through the hook to verify that mail is scanned."),
    "hook": ("contentfilter.cli.hook", "hook", "Install the hook into qmail, remove it, show its state."),
    "migrate": ("contentfilter.cli.migrate", "migrate", "Convert the control files of H-Sphere or simscan."),
    "events-key": (
        "contentfilter.cli.events_key",
        "events_key",
        "Create a key pair for the event feed over the network.",
    ),
    "spamd-options": (
        "contentfilter.cli.spamd_options",
        "spamd_options",
        "Print the options that spamd must be started with.",
    ),
    "install": ("contentfilter.cli.install", "install", "Set up the server: user, directories, units, manual pages."),
    "uninstall": ("contentfilter.cli.install", "uninstall", "Remove what install made."),
    "completion": ("contentfilter.cli.completion", "completion", "Print the completion script for a shell."),
}


class Lazy(click.Group):
    """Group that imports the module of a sub-command only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and options, without importing any command module."""
        found = [
            CompletionItem(name, help=text) for name, (_, _, text) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the sub-command and report its configuration errors."""
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
    help="Settings file. If the default file is missing, the built-in defaults apply.",
)
@click.version_option(__version__, prog_name="contentfilter")
@click.pass_context
def cli(ctx: click.Context, config_path: str) -> None:
    """Content filter for qmail: scans each message before qmail-queue accepts it."""
    ctx.obj = config_path


def main() -> Any:
    """Entry point of the installed command."""
    return cli(prog_name="contentfilter")
