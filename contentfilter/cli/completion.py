"""``contentfilter completion``: the completion script for a shell."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash: contentfilter completion bash >/etc/bash_completion.d/contentfilter
    zsh:  contentfilter completion zsh >"${fpath[1]}/_contentfilter"
    fish: contentfilter completion fish >/etc/fish/completions/contentfilter.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"click does not support completion for {shell}")
    script = kind(ctx.find_root().command, {}, "contentfilter", "_CONTENTFILTER_COMPLETE")
    click.echo(script.source_template % script.source_vars(), nl=False)  # source() would call bash for its version
