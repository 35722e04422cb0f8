"""Renders docs/cli.md from the command-line parser, like a man page. It runs no command and asks no daemon.

`render()` is for `scripts/gen_docs.py`; run by itself it prints the page.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from nvcache.__main__ import PROGRAM, cli
from nvcache.cli.exits import EXIT_OF, MEANING

INTRO = """\
# nvcache(1)

<!-- Generated from the parser by scripts/gen_docs.py; edit the commands' help in nvcache/cli/ instead. -->

`{name}` — {summary}

stdout carries what was asked for and nothing else; progress, warnings and errors go to stderr. Errors read `nvcache: cannot …: why` with a `hint:`
line below. `REF` is `hf://org/name[@revision]`, `org/name[@revision]`, `az://account/container/prefix[@revision]` (or its https:// URL, no SAS)
or `file:///absolute/dir`; for a model that is here also its entry or slug, as `df` and `show` print them. The revision of a model that is here
may be cut to its first 7 digits or more: `org/name@cef110c9f631`, as `ls` shows it.
"""

ENVIRONMENT = """\
## Environment

| variable | meaning |
|---|---|
| `NVCACHE_URL` | the daemon for all commands but `serve`: `unix:///path.sock` or `http://host:port` |
| `NVCACHE_SOCKET` | the daemon's Unix socket, for `serve` and for the commands that ask it; `NVCACHE_URL` wins |
| `NVCACHE_TOKEN_FILE` | file with the bearer token, where the daemon is asked over TCP |
| `NVCACHE_HOLDER` | the name under which leases are held; else the pod's, `POD_NAMESPACE` and `POD_NAME` (downward API); else host and process |
| `NVCACHE_CONFIG` | the TOML file of `serve`, `disks` and `config` |
| `NVCACHE_<SETTING>` | every setting of `serve` and `disks`: `--max-bytes` is `NVCACHE_MAX_BYTES`; lists are separated by commas |
| `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` | the Hub or a mirror of it, and its token; read by the daemon |
| `AZURE_STORAGE_ACCOUNT` | the storage account that the key or the SAS is for; read by the daemon |
| `AZURE_STORAGE_KEY`, `AZURE_STORAGE_SAS_TOKEN` | that account's key, or a SAS; `NVCACHE_AZ_KEY_FILE` and `NVCACHE_AZ_SAS_FILE` name files instead |
| `AZURE_STORAGE_CONNECTION_STRING` | a connection string; `NVCACHE_AZ_CONNECTION_STRING_FILE` names a file instead |
| `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY` | proxies; read by the daemon |
| `SSL_CERT_FILE` | certificates to trust instead of the system's; read by the daemon |

A flag counts before `NVCACHE_*`, that before the TOML file, that before the variables shared with other tools, and those before the defaults.
"""

FILES = """\
## Files

| path | what |
|---|---|
| `/run/nvcache/nvcache.sock`, `admin.sock` | the sockets of a daemon run by root: for pods (0660) and for its operator (0600) |
| `$XDG_RUNTIME_DIR/nvcache/nvcache.sock` | the socket of a daemon run by another user (`/tmp/nvcache-UID/…` where that is not set) |
| `$XDG_CACHE_HOME/nvcache/store` | the store unless `NVCACHE_STORE` names another (`~/.cache/nvcache/store`) |
| `/var/lib/nvcache/mnt` | where `disks` mounts the stripe unless `NVCACHE_MOUNT` names another; the store is `store` in it |
| `/run/nvcache/disks/stripe.json` | what `disks watch` tells `serve --follow`; the answer is `/run/nvcache/serve.json` |
"""

EXAMPLES = """\
## Examples

```sh
nvcache serve &                                       # a daemon of one's own, no root
DIR=$(nvcache warm --wait-daemon 10 Qwen/Qwen3-0.6B)  # wait until it is ready, keep its directory
nvcache warm org/name@v1.2 --timeout 600 --json       # for scripts: one object, exit code by cause
nvcache warm org/name --dry-run                       # what would be fetched, and does it fit
vllm serve "$(nvcache path org/name)"                 # load what is there; exit 3 if it is not
nvcache warm org/name --lease --page-cache            # an init container: ready, held, in memory, or an exit code
nvcache hold org/name                                 # its sidecar: keeps the lease until SIGTERM
nvcache rm org/name@cef110c9f631                      # one revision, by the digits that `nvcache ls` shows
HF_HUB_CACHE=$(nvcache path --hub org/name) HF_HUB_OFFLINE=1 python app.py
nvcache verify org/name                               # re-read, mend bad chunks
nvcache why org/name                                  # what made its last start slow, phase by phase
nvcache disks plan --backend md                       # what would be made of the node's NVMe disks; writes nothing
nvcache disks ensure --backend md --json              # have the stripe mounted; exit 0 only then
nvcache config check nvcache.toml                     # all that is wrong with it, exit 2; before it is rolled out
nvcache config show --origin                          # every setting, and where it comes from
eval "$(nvcache completion bash)"
```
"""


def render() -> str:
    """The whole page."""
    root = click.Context(cli, info_name=PROGRAM, terminal_width=100)
    parts = [INTRO.format(name=PROGRAM, summary=cli.help or "").rstrip(), _synopsis(root), "## Options of every command", _options(cli, root)]
    parts.append("## Commands")
    parts.extend(_commands(cli, root))
    parts += [_exits(), ENVIRONMENT.rstrip(), FILES.rstrip(), EXAMPLES.rstrip()]
    return "\n\n".join(parts) + "\n"


def _synopsis(root: click.Context) -> str:
    names = " | ".join(cli.list_commands(root))
    return f"```\n{PROGRAM} [--url URL | --socket PATH] [--debug] COMMAND …\nCOMMAND: {names}\n```"


def _commands(group: click.Group, above: click.Context) -> Iterator[str]:
    """Every command of a group, each followed by its own commands."""
    for name in group.list_commands(above):
        command = group.commands[name]
        context = click.Context(command, info_name=name, parent=above)
        yield from _command(command, context)
        if isinstance(command, click.Group):
            yield from _commands(command, context)


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"### {context.command_path}"
    yield f"```\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield inspect.cleandoc(command.help or "")
    options = _options(command, context)
    if options:
        yield options
    if context.parent and context.parent.parent:
        yield f"And the options of `{context.parent.command_path}`."


def _options(command: click.Command, context: click.Context) -> str:
    above = context.parent.command.get_params(context.parent) if context.parent and context.parent.parent else []
    told = {option for param in above for option in param.opts} | {"--help"}
    shown = [param for param in command.get_params(context) if isinstance(param, click.Option) and not told.intersection(param.opts)]
    rows = [record for param in shown if (record := param.get_help_record(context))]
    if not rows:
        return ""
    return "\n".join(["| option | meaning |", "|---|---|", *(f"| `{_cell(flag)}` | {_cell(text)} |" for flag, text in rows)])


def _exits() -> str:
    lines = ["## Exit codes", "", "| code | meaning | error codes |", "|---|---|---|"]
    for exit_, meaning in MEANING.items():
        codes = ", ".join(f"`{code}`" for code, mapped in EXIT_OF.items() if mapped is exit_)
        lines.append(f"| {int(exit_)} | {_cell(meaning)} | {codes} |")
    lines += ["", "With several REFs the code is that of what most needs a person: bad bytes before a busy source, a busy source before a time-out."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(render(), end="")
