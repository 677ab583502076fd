"""The commands about bundles: `graphopt lower` and `graphopt run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from graphopt.cli_options import (
    DATA,
    common,
    compress_option,
    force_option,
    print_json,
    seed_option,
    threads_option,
)
from graphopt.cli_sizes import size_options


@click.command(short_help="Write the deployable bundle of a target.")
@click.argument("model", type=click.Path())
@click.option("--target", required=True, metavar="NAME", help="Device and runtime; see `graphopt targets`.")
@click.option("-o", "--output", "out", required=True, type=click.Path(), metavar="OUT", help="Folder for the bundle.")
@click.option("--calib", metavar="DATA", help=f"Real inputs, to time and to verify it; without: random. {DATA}")
@click.option("--verify", is_flag=True, help="Run the bundle beside MODEL; where they differ, nothing is written.")
@click.option(
    "--tolerance", type=float, metavar="X", help="Relative difference --verify allows; without: by the number formats."
)
@click.option("--tune", type=click.FloatRange(1), metavar="SECONDS", help="Search so long for faster kernels (TVM).")
@click.option(
    "--set",
    "more",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another option of the target's backend, which `graphopt targets NAME` lists; repeatable.",
)
@size_options
@seed_option
@compress_option
@force_option
@common
def lower(
    model: str,
    target: str,
    out: str,
    more: Sequence[str],
    seed: int | None,
    tune: float | None,
    compress: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the deployable bundle of a target for MODEL."""
    from inspect import signature

    from graphopt.jobs import lower as write
    from graphopt.lowering.options import assignments
    from graphopt.pipeline.destination import check_folder
    from graphopt.report import tables

    folder = check_folder(out, [model], force=force)
    own = assignments(more, {"tune": tune, "compress": compress}, signature(write).parameters)
    made = write(model, target, folder, seed=seed or 0, **options, **own)
    files, verified, warnings = map(str, made.files), made.manifest["verified"], made.manifest["warnings"]
    if as_json:
        print_json({"files": list(files), "verified": verified, "warnings": warnings})
    else:
        if verified is not None:
            click.echo(f"differs from MODEL by {verified['relative']:.2g} relative ({verified['ran']})")
        click.echo(f"wrote {', '.join(files)}")
    tables.print_warnings(tables.console(sys.stderr), warnings)


@click.command(short_help="Execute a bundle on this machine.")
@click.argument("bundle", type=click.Path())
@click.option("--input", "inputs", required=True, type=click.Path(), metavar="X.npz", help="Arrays by input name.")
@click.option("-o", "--output", "out", required=True, type=click.Path(), metavar="Y.npz", help="Arrays by output name.")
@threads_option
@common
def run(bundle: str, inputs: str, out: str, threads: int, as_json: bool) -> None:
    """Execute BUNDLE here, where this machine can."""
    from graphopt.jobs import run as execute
    from graphopt.jobs import save_arrays
    from graphopt.pipeline.destination import check_file
    from graphopt.report import tables

    check_file(out, [inputs])
    found = execute(bundle, inputs, threads=threads)
    save_arrays(out, found)
    rows = [{"output": name, "dtype": str(array.dtype), "shape": list(array.shape)} for name, array in found.items()]
    if as_json:
        print_json({"written": out, "outputs": rows})
    else:
        tables.print_mappings(tables.console(sys.stdout), rows)
        click.echo(f"wrote {out}")
