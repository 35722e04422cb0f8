"""`nvcache affinity`: how a pod says that it wants a node which has a model ready. It asks neither a daemon nor a cluster."""

from __future__ import annotations

import click

from nvcache.cli import output
from nvcache.cli.exits import Exit

STANZA = """\
# nodes where nvcache has {ref} ready; under spec.affinity of a pod
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          - key: {key}
            operator: In
            values: [{value}]"""


@click.command()
@click.argument("ref")
@click.option("--json", "json_", is_flag=True, help="the same as JSON, without the comment")
@click.option("--label", is_flag=True, help="only the label, as KEY=VALUE: for nodeSelector, KAITO's labelSelector and kubectl get nodes -l")
def affinity(ref: str, *, json_: bool, label: bool) -> int:
    """Print the nodeAffinity that puts a pod on nodes where a model is ready.

    The model is named by a full commit, or without a revision: then nodes count that have what it stood for when they looked last. No daemon is
    asked.
    """
    from nvcache.core import signals
    from nvcache.core.ref import parse_ref

    if json_ and label:
        raise click.UsageError("--json and --label are two forms of one answer")
    wanted = parse_ref(ref)
    signals.check_selectable(wanted)
    key, value = signals.label_of(wanted), signals.READY
    if label:
        click.echo(f"{key}={value}")
    elif json_:
        terms = [{"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}]
        output.as_json({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}})
    else:
        click.echo(STANZA.format(ref=output.visible(signals.canonical(wanted)), key=key, value=value))
    return Exit.OK
