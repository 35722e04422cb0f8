"""`nvcache ui`: the daemon's page in a browser of this machine, through the daemon's socket. It shows nothing itself; `bridge` is the way there."""

from __future__ import annotations

import click

from nvcache.cli import output
from nvcache.cli.daemon import connected, daemon
from nvcache.cli.exits import Exit


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="port on 127.0.0.1  [default: any that is free]")
@click.option("--no-open", is_flag=True, help="only print the link, for a browser elsewhere behind a forwarded port")
@connected
def ui(*, port: int, no_open: bool) -> int:
    """Show models, jobs, space and disks in a browser, live, until Ctrl-C.

    The page comes by an address of this machine alone and only looks: nothing can be changed there. The link lets in one browser, once, and without
    --no-open one of yours. For a node elsewhere forward a port: `ssh -L 8080:127.0.0.1:8080 NODE nvcache ui --no-open --port 8080`.
    """
    import webbrowser

    from nvcache.cli.bridge import Bridge

    asked = daemon()
    asked.whole(asked.get("/v1/space"), "limit")  # who is away, or does not let us look, is better told here than in a browser
    try:
        with Bridge(asked.url, port, private=not no_open) as bridge:
            click.echo(bridge.link)
            opened = not no_open and webbrowser.open(bridge.link)
            output.say(f"{'opened in your browser' if opened else 'open this link in a browser; it works once'}; Ctrl-C ends it")
            bridge.wait()
    except KeyboardInterrupt:
        click.echo(err=True)  # the terminal wrote ^C
    return Exit.OK
