"""Where each input's output goes, and which of them stand already. Imports no torch."""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Sequence

from maskserve.batch.conversion import CONVERT
from maskserve.batch.inputs import identity
from maskserve.errors import MaskserveError, OutputExistsError, ParameterError, SettingsError, nearest
from maskserve.payload.files import TEMP_PREFIX
from maskserve.payload.header import shown
from maskserve.stores.addresses import STORES, is_address, parse

OWN = "_maskserve"
"""The folder beside the outputs that holds the ledger."""
FIELDS = ("stem", "name", "path", "index")
SUFFIXES = ("", ".json", ".safetensors")


def names(pattern: str, to: str, inputs: Sequence[str]) -> list[str]:
    """The output of each input, in the same order; two of one name, or one that is an input, are an error."""
    check_pattern(pattern)
    made = [named(pattern, path, index) for index, path in enumerate(inputs)]
    first: dict[str, int] = {}
    for index, name in enumerate(made):
        check_name(name, pattern, inputs[index])
        if (before := first.setdefault(name, index)) != index:
            raise SettingsError(
                f"output.name: {shown(inputs[before])} and {shown(inputs[index])} would both be written to "
                f"{shown(name)}; use {{path}} or {{index:06d}} in output.name",
                parameter="name",
            )
    outputs = [os.path.join(to, name) for name in made]
    refuse_inputs(outputs, inputs)
    return outputs


def check_pattern(pattern: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
        named(pattern, "a", 0)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        fields = ["", str(error)]
    for field in fields:
        if field not in FIELDS:
            allowed = ", ".join(f"{{{known}}}" for known in FIELDS)
            raise SettingsError(
                f"output.name {pattern!r:.80}: a name is made of text and {allowed}{nearest(field, FIELDS)}",
                parameter="name",
            )


def named(pattern: str, path: str, index: int) -> str:
    name = os.path.basename(path)
    if is_address(path):
        path = path.partition("://")[2]
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return pattern.format(stem=os.path.splitext(name)[0], name=name, path="/".join(parts), index=index)


def check_name(name: str, pattern: str, path: str) -> None:
    parts = name.split("/")
    if any(part in ("", ".", "..", OWN) or part.startswith(TEMP_PREFIX) for part in parts):
        raise SettingsError(
            f"output.name {pattern!r:.80} makes {shown(name)} of {shown(path)}; give a path below the output folder, without "
            f".. and {OWN}",
            parameter="name",
        )


def refuse_inputs(outputs: Iterable[str], inputs: Iterable[str]) -> None:
    sources = {identity(path): path for path in inputs}
    for output in outputs:
        if (path := sources.get(identity(output))) is not None:
            raise SettingsError(
                f"{shown(path)} would be an input and an output; write to a folder that input.paths does not match",
                parameter="to",
            )


def check_to(to: str) -> None:
    """Raise where outputs cannot be written to an address."""
    if not is_address(to):
        return
    try:
        address = parse(to)
    except ParameterError as error:
        raise SettingsError(f"output.to: {error.message}", parameter="to") from None
    if address.scheme not in STORES:
        raise SettingsError(
            f"output.to {address}: outputs go to a folder, or to {', '.join(STORES)} (s3://BUCKET/PREFIX)",
            parameter="to",
        )


def check_form(verb: str, pattern: str, to: str) -> None:
    """Raise where no output can have this suffix."""
    check_to(to)
    suffix = os.path.splitext(pattern)[1]
    if verb == CONVERT:
        from maskserve.convert.files import refuse_in_store, target_format

        try:
            refuse_in_store(to, target_format(f"x{suffix}", None))
        except MaskserveError as error:
            raise SettingsError(f"output.name: {error.message}", parameter="name") from None
    elif suffix not in SUFFIXES and "{" not in suffix:
        raise SettingsError(
            f"output.name {pattern!r:.80}: an answer is written as .safetensors, .json or with no suffix; a second job with "
            f'verb = "{CONVERT}" makes other formats of them',
            parameter="name",
        )


def standing(outputs: Iterable[str], to: str) -> set[str]:
    """Those of the outputs below `to` that stand; each folder is looked through once, a store is listed once."""
    if is_address(to):
        from maskserve.stores import listing

        return listing.below(to) & set(outputs)
    by_folder: dict[str, set[str]] = {}
    for output in outputs:
        by_folder.setdefault(os.path.dirname(output), set()).add(output)
    found: set[str] = set()
    for folder, wanted in by_folder.items():
        try:
            with os.scandir(folder) as entries:
                found |= wanted & {os.path.join(folder, entry.name) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def refuse_standing(found: set[str]) -> None:
    if found:
        first = min(found)
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise OutputExistsError(
            f'{shown(first)}{more} exist{"" if more else "s"}, and output.exists is "error"; "resume" does what is '
            f'missing, "replace" does all again',
            parameter="exists",
        )
