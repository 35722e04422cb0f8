"""From a listing to the plan of a fill: which files, and what is refused before a byte is fetched. It asks no source and looks at no store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nvcache.core.manifest import LeftOut, Selection
from nvcache.core.names import check_names
from nvcache.core.plan import FillPlan, RemoteFile
from nvcache.core.ref import Ref, Scheme
from nvcache.core.selection import chooses, is_safetensors
from nvcache.errors import Code, IntegrityError, RequestError
from nvcache.sources.base import Resolved

MAX_FILES = 100_000


def make_plan(
    resolved: Resolved,
    listing: Iterable[RemoteFile],
    *,
    asked: str,
    selection: Selection,
    also: Iterable[str] = (),
    require_digest: bool = False,
) -> FillPlan:
    """Choose the files of a listing and refuse what is unsafe, before a byte is fetched. `also` are paths an earlier fill of the entry has.

    Raises `IntegrityError` (hostile-name, listing-conflict), `RequestError` (bad-request: nothing is left to fetch; no-digest).
    """
    files = list(dict.fromkeys(listing))
    if len(files) > MAX_FILES:
        raise IntegrityError(Code.LISTING_CONFLICT, f"cannot plan {resolved.ref}: it lists more than {MAX_FILES} files")
    wanted = chooses(selection, (file.path for file in files)) | set(also)
    chosen = [file for file in files if file.path in wanted]
    if not chosen:
        raise RequestError(
            Code.BAD_REQUEST,
            f"cannot plan {resolved.ref}: of its {len(files)} files none is selected",
            hint="change --include/--exclude; `nvcache warm REF --dry-run` lists the files",
        )
    if resolved.ref.scheme is Scheme.AZ and not selection.include:
        _refuse_no_model(resolved.ref, [file.path for file in chosen])
    check_names(file.path for file in chosen)
    if require_digest:
        refuse_unproven(resolved.ref, [file.path for file in chosen if file.digest is None])
    for file in chosen:
        if file.size < 0:
            raise IntegrityError(Code.LISTING_CONFLICT, f"cannot plan {resolved.ref}: {file.path!r} has size {file.size}")
    return FillPlan(
        ref=resolved.ref,
        asked=asked,
        endpoint=resolved.endpoint,
        files=tuple(chosen),
        selection=selection,
        left_out=tuple(LeftOut(file.path, file.size) for file in files if file.path not in wanted),
        names=(resolved.name,) if resolved.name else (),
        commit=resolved.commit,
    )


def _refuse_no_model(ref: Ref, paths: Sequence[str]) -> None:
    """A container may hold anything: neither a mistyped prefix nor one that ends too early, above several models, must pass for a model.

    A model of several parts, each with weights and a description of its own, is told by the description at its top.
    """
    weights = {path.rpartition("/")[0] for path in paths if is_safetensors(path)}
    if not weights:
        raise RequestError(
            Code.BAD_REQUEST,
            f"cannot plan {ref}: it holds {len(paths)} files and no safetensors among them, {paths[0][:80]!r} for one",
            hint="check the prefix; to take the files all the same: --include '*'",
        )
    if any("/" not in path and path.endswith(".json") for path in paths):
        return
    folders = weights & {path.rpartition("/")[0] for path in paths if path.endswith("config.json")}
    if len(folders) > 1:
        some = ", ".join(repr(folder) for folder in sorted(folders)[:3])
        raise RequestError(
            Code.BAD_REQUEST,
            f"cannot plan {ref}: it holds {len(folders)} models, {some}{' and more' if len(folders) > 3 else ''}",
            hint="name one of them; to take all as one model: --include '*'",
        )


def refuse_unproven(ref: Ref, paths: Sequence[str]) -> None:
    """Raises `RequestError` (no-digest) when there are files whose source publishes no digest, and digests are required."""
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise RequestError(Code.NO_DIGEST, f"cannot accept {ref}: its source publishes no digest for {paths[0]!r}{more}")
