"""`likeness models`: what there is, fetching it, converting pickles, checking files. Loads torch only where a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployments.catalog import CATALOG_PATH, Catalog, Entry, load_catalog
from deployments.conversion.table import CONVERSIONS_PATH, Conversion, conversion_named, convert, load_conversions
from deployments.errors import FetchFailed, UnknownModel
from deployments.fetching import Wanted, conversions_due, fetch, is_here, needed_by, size_of, wanted
from deployments.weights import WeightFile
from serve.cli_output import ERR, OUT, table
from serve.presets import load_presets

models = typer.Typer(help="What models there are, and getting the real ones.", no_args_is_help=True)

CatalogOption = Annotated[Path, typer.Option("--catalog", help="Another catalogue than configs/catalog.yaml.", show_default=False)]
ConversionsOption = Annotated[Path, typer.Option("--conversions", help="Another table than configs/conversions.yaml.", show_default=False)]


@models.command("list")
def list_models(catalog: CatalogOption = CATALOG_PATH) -> None:
    """Every model of the catalogue, what it fits and what it may be used for."""
    lines = table("id", "role", "family", "fits", "licence", "commercial use")
    for entry in load_catalog(catalog).models.values():
        licence = entry.licence
        lines.add_row(entry.id, entry.role, entry.family, ", ".join(entry.fits), licence.name, "yes" if licence.commercial else "no")
    OUT.print(lines)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="A base model (with all that fits it), any other model, a workflow, or a conversion.")],
    base: Annotated[str | None, typer.Option(help="For a workflow: the base model to fetch it for, where there are several.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the files, their sizes and licences.")] = False,
    catalog: CatalogOption = CATALOG_PATH,
    conversions: ConversionsOption = CONVERSIONS_PATH,
) -> None:
    """Fetch the published weights of a model and of all that it needs. Goes on where it stopped; every file is verified.

    Gated repos (FLUX.1-dev) need an account that accepted the licence: set HF_TOKEN or HUGGINGFACE_TOKEN. By pulling you accept the
    licences that are printed.
    """
    table = load_conversions(conversions)
    files = _files_of(name, base, load_catalog(catalog), table)
    if not files:
        OUT.print(f"{name} needs nothing from the network: its weights come with this repository.", markup=False)
        return
    _print_files(files)
    if dry_run:
        return
    for number, item in enumerate(files, 1):
        ERR.print(f"{number}/{len(files)} {item.file.repo}: {item.file.file}", markup=False)
        fetch(item.file)
    for due in dict.fromkeys(conversions_due(files, table)):
        OUT.print(f"Published as a pickle, to be converted once: likeness models convert {due}", markup=False)
    OUT.print(f"{len(files)} files are here and verified.")


@models.command("convert")
def convert_model(
    name: Annotated[str, typer.Argument(help="A conversion of configs/conversions.yaml: eva02-clip-l-336, face-parser-bisenet, ...")],
    source: Annotated[Path | None, typer.Option(help="The published file, where it is not in the Hugging Face cache.")] = None,
    conversions: ConversionsOption = CONVERSIONS_PATH,
) -> None:
    """Turn a published pickle into safetensors or ONNX, once. It is verified first, and read without running anything in it."""
    table = load_conversions(conversions)
    target = convert(name, conversion_named(table, name), source, pins=conversions.with_name("converted.yaml"))
    OUT.print(f"{target} ({_amount(target.stat().st_size)}), pinned in {conversions.with_name('converted.yaml')}", markup=False)


@models.command()
def check(
    name: Annotated[str, typer.Argument(help="A model of the catalogue, or a pipeline folder (one with a model_index.json).")],
    catalog: CatalogOption = CATALOG_PATH,
) -> None:
    """Compare names and shapes of all tensors with what the code expects, without loading any. Status 1 where something is wrong."""
    from deployments.checking import check_entry, check_pipeline

    folder = Path(name)
    found = check_pipeline(folder) if (folder / "model_index.json").is_file() else check_entry(load_catalog(catalog).entry(name))
    for part in found:
        if part.error is None:
            OUT.print(f"ok     {part.part}: {f'{part.tensors} tensors' if part.tensors else 'sound'}", markup=False)
        else:
            OUT.print(f"WRONG  {part.part}: {part.error.message}", markup=False)
            OUT.print(f"       {part.error.remedy}", markup=False)
    if any(part.error is not None for part in found):
        raise typer.Exit(1)


def _files_of(name: str, base: str | None, catalog: Catalog, conversions: dict[str, Conversion]) -> list[Wanted]:
    presets = load_presets()
    if name in conversions:
        return [Wanted(name, conversions[name].source, conversions[name].licence, name)]
    if name not in presets:
        return wanted(needed_by(catalog, catalog.entry(name)), conversions)
    preset = presets[name]
    chosen = catalog.entry(base) if base is not None else _published_base(preset.family, catalog)
    identity = [catalog.fitting(preset.method, chosen.id)] if preset.method else []
    around = [entry for entry in needed_by(catalog, chosen)[1:] if entry.role in ("faces", "parser", "judge")]
    return wanted([chosen, *identity, *around], conversions)


def _published_base(family: str, catalog: Catalog) -> Entry:
    """The base model of a family whose weights lie on the hub. Raises UnknownModel unless there is exactly one."""
    bases = [entry for entry in catalog.models.values() if entry.role == "base" and entry.family == family and _is_published(entry)]
    if len(bases) != 1:
        names = ", ".join(entry.id for entry in bases) or "none"
        raise UnknownModel(f"The published base models of the family {family}: {names}.", "Say which is meant with --base.")
    return bases[0]


def _is_published(entry: Entry) -> bool:
    return not all(weight.local for weight in entry.weights.values())


def _print_files(files: list[Wanted]) -> None:
    lines = table("model", "repo", "file", "size", "here", "licence")
    total, unknown, reachable = 0, 0, True
    for item in files:
        size, reachable = _size(item.file, reachable)
        here = is_here(item.file)
        total, unknown = total + (0 if here else size or 0), unknown + (size is None)
        mark = item.licence.name + ("" if item.licence.commercial else " (not commercial)")
        lines.add_row(item.model, item.file.repo, item.file.file, "?" if size is None else _amount(size), "yes" if here else "no", mark)
    OUT.print(lines)
    OUT.print(
        f"To fetch: {_amount(total)}" + (f" and {unknown} files whose size the hub was not asked or did not say." if unknown else ".")
    )


def _size(file: WeightFile, reachable: bool) -> tuple[int | None, bool]:
    """(bytes if known, whether asking on makes sense): one hub that does not answer is enough."""
    if file.bytes is None and not reachable:
        return None, False
    try:
        return size_of(file), reachable
    except FetchFailed as error:
        ERR.print(f"{error.message} {error.remedy}", markup=False)
        return None, False


def _amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
