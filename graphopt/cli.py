"""The command line: each command parses, calls the API and prints. What a command does stands in the API.

Heavy imports stand inside the commands, so that `graphopt --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from graphopt.cli_bundles import lower, run
from graphopt.cli_options import (
    DATA,
    common,
    compress_option,
    force_option,
    print_json,
    print_rows,
    seed_option,
    target_option,
    threads_option,
)
from graphopt.cli_sizes import size_options
from graphopt.shell import Shell, State


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="graphopt", message="%(prog)s %(version)s")
def cli() -> None:
    """Make trained ONNX models smaller and faster, and prove after each pass what that did.

    \b
    Exit codes: 0 done, 1 internal error, 2 usage or recipe, 3 invalid or unsupported model or data,
    4 verification failed, 5 a gate refused and nothing better was found, 6 a backend or tool is missing,
    130 interrupted.
    """


@cli.command()
@click.argument("model", type=click.Path())
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(),
    metavar="OUT",
    help="A .onnx file, a .safetensors archive, or a folder for all results.",
)
@click.option("--passes", metavar="SPEC", help="Pipeline, such as 'fold,prune{macs=0.5},quantize'.")
@click.option("--recipe", type=click.Path(), metavar="FILE", help="Pipeline and options from a file (--save-recipe).")
@click.option(
    "-O",
    "preset",
    type=click.Choice(["0", "1", "2", "3"]),
    help="Preset: -O0 .. -O3, with --max-drop 1% --max-latency 1 unless said.  [default: 1]",
)
@target_option
@click.option("--calib", metavar="DATA", help=f"Unlabelled inputs. {DATA}")
@click.option("--eval", "evaluate", metavar="DATA", help="Labelled .npz (inputs and 'labels'), or MODULE:FUNCTION.")
@click.option("--metric", metavar="NAME", help="For --eval DATA.npz: top1, top5, mse, cosine.")
@click.option("--max-drop", metavar="X", help="Undo a pass that costs more accuracy: 0.01, 1%, inf.")
@click.option(
    "--max-latency",
    metavar="R",
    help="Undo a pass that makes it slower than R times the input model, beyond the noise measured; "
    "for R = 1, up to 1.02 counts as equal.",
)
@size_options
@seed_option
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Threads that passes may use.")
@click.option("--report", "page", type=click.Path(), metavar="FILE.html", help="Write the report as a page.")
@click.option("--dry-run", is_flag=True, help="Check everything and plan; run no pass, write no model.")
@click.option("--save-recipe", type=click.Path(), metavar="FILE", help="Write pipeline and options to a file.")
@compress_option
@click.option(
    "--print-ir-after", multiple=True, metavar="PASS", help="Print the model after a pass, or 'all'; repeatable."
)
@click.option("--dump-ir", type=click.Path(), metavar="DIR", help="Write the model's text before and after each pass.")
@click.option("--verify-each", type=click.Choice(["structure", "numeric", "off"]), default="numeric", show_default=True)
@click.option("--bisect-limit", type=int, metavar="N", help="Run only the first N passes.")
@force_option
@common
@click.pass_obj
def optimize(
    state: State,
    /,
    model: str,
    out: str | None,
    page: str | None,
    save_recipe: str | None,
    compress: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make MODEL smaller and faster.

    Without --passes, --recipe and -O it is -O1. --passes has no gates but those you ask for. The input model is never
    changed. Where the gates refuse everything, the exit code is 5 and no model is written.
    """
    _limit_threads(options["jobs"])
    from graphopt.api import optimize as run_pipeline
    from graphopt.errors import GateRefused, UsageError
    from graphopt.pipeline.destination import check_bundle, check_file, check_output, is_model_file
    from graphopt.report.live import LiveProgress

    if options["passes"] is not None and not options["passes"].strip():
        # In Python that is a pipeline as any other; in a script it is a variable that was not set.
        raise UsageError("names no pass", where="--passes", hint="name one, such as fold; -O0 copies the model")
    if out is not None:
        check_output(out, [model], force=force)
        check_bundle(out, options["target"], model, options["dim"], options["input_shape"])
    elif compress:
        raise UsageError("says how OUT is stored, and there is none", where="--compress", hint="name one with -o")
    for file in (page, save_recipe):
        if file is not None:
            check_file(file, [model])
    progress = LiveProgress()
    try:
        result = run_pipeline(model, progress=progress, say=progress.say, command=state.command, **options)
    except GateRefused as refused:
        progress.close()
        if refused.report is not None:
            _show(refused.report, page, as_json)
        raise
    finally:
        progress.close()
    written: list[str] = []
    if out is not None and not options["dry_run"]:
        write = result.save if is_model_file(out) else result.deploy
        written = [str(path) for path in write(out, compress=compress)]
    if save_recipe is not None:
        from graphopt.pipeline.recipe import write_recipe

        write_recipe(result.recipe, save_recipe)
        written.append(save_recipe)
    _show(result.report, page, as_json)
    written += [page] if page is not None else []
    if written and not as_json:
        click.echo(f"wrote {', '.join(dict.fromkeys(written))}")
    elif not options["dry_run"] and not as_json:
        click.echo("nothing was written: -o OUT writes the model")


def _limit_threads(jobs: int) -> None:
    """Keep linear algebra to the threads asked for; it reads these once, when numpy is first imported.

    Besides, sums then come out the same on machines with more or fewer cores. What the user set himself stands.
    """
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(jobs))


def _show(report: Any, page: str | None, as_json: bool) -> None:
    """Print a report, write its page, and put its warnings where they are seen."""
    from graphopt.report import summary, tables

    if page is not None:
        from graphopt.report.html import write

        write(report, page)  # before anything is on stdout, where an error would have to follow it
    if as_json:
        click.echo(report.to_json())
    else:
        tables.print_report(tables.console(sys.stdout), report)
    sys.stdout.flush()
    tables.print_warnings(tables.console(sys.stderr), summary.warnings(report))


@cli.command(short_help="What of MODEL can be pruned, and for what cannot: why.")
@click.argument("model", type=click.Path())
@click.option("--units", is_flag=True, help="Also the units themselves: what may be removed together.")
@click.option(
    "--target",
    metavar="NAME",
    help="Also which layers its 2:4 kernels and which nodes its accelerators take, and why not.",
)
@size_options
@common
def inspect(model: str, units: bool, target: str | None, as_json: bool, **sizes: Any) -> None:
    """Count MODEL, and tell what of it can be pruned, and for what cannot: why."""
    from graphopt.inspection import inspect as find

    found = find(model, target=target, **sizes)
    if as_json:
        print_json(found.to_dict(units=units))
        return
    from graphopt.report import tables

    tables.print_inspection(tables.console(sys.stdout), model, found, units=units)


@cli.command(short_help="Do the models A and B compute the same?")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--calib", metavar="DATA", help=f"What to run both on; without: random inputs. {DATA}")
@click.option(
    "--tolerance", type=float, metavar="X", help="Relative difference allowed; without: rounding of the dtype."
)
@click.option("--layers", is_flag=True, help="Also which layers of B make the error, and what to leave in float.")
@size_options
@seed_option
@common
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    a: str,
    b: str,
    tolerance: float | None,
    layers: bool,
    seed: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Do the models A and B compute the same? Exit code 4 where they do not."""
    from graphopt import jobs
    from graphopt.report import tables
    from graphopt.report.layers import print_layers

    found = jobs.compare(a, b, seed=seed or 0, **options)
    errors = jobs.compare_layers(a, b, seed=seed or 0, **options) if layers else None
    equal = found.equal if tolerance is None else found.worst_relative <= tolerance
    if as_json:
        print_json(tables.comparison_dict(found, equal) | ({"layers": errors.to_dict()} if errors else {}))
    else:
        tables.print_comparison(tables.console(sys.stdout), found, equal)
        if errors is not None:
            print_layers(tables.console(sys.stdout), errors)
    tables.print_warnings(tables.console(sys.stderr), [*found.notes, *(errors.notes if errors else ())])
    ctx.exit(0 if equal else 4)


@cli.command(short_help="Measure MODELS in turn, as ratios.")
@click.argument("models", nargs=-1, required=True, type=click.Path())
@target_option
@click.option("--calib", metavar="DATA", help=f"Real inputs, one batch; without: random inputs. {DATA}")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples per run, with --calib.")
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Time to measure for.")
@click.option("--table", "layers", is_flag=True, help="Measure single layers instead, at the widths of pruning.")
@threads_option
@size_options
@common
def bench(models: Sequence[str], target: str | None, layers: bool, as_json: bool, **options: Any) -> None:
    """Measure MODELS in turn; ratios are to the first, below 1 is faster.

    With --table: measure the layers of each model at all widths that pruning can give them, which prune{latency=X}
    goes by. Times are kept for this machine in $GRAPHOPT_CACHE, by default graphopt/ in the user's cache folder, and
    only what is missing is measured; --json prints the table, for prune{table=FILE} on another machine.
    """
    from graphopt.jobs import bench as measure
    from graphopt.report import tables

    if layers:
        _bench_layers(models, target or "cpu", as_json, options)
        return
    found = measure(models, target or "cpu", **options)
    if as_json:
        print_json(tables.bench_dict(models, found))
    else:
        tables.print_bench(tables.console(sys.stdout), models, found)


def _bench_layers(models: Sequence[str], target: str, as_json: bool, options: dict[str, Any]) -> None:
    from graphopt.jobs import latency_table

    taken = {name: options[name] for name in ("calib", "threads", "dim", "input_shape")}
    found = [latency_table(model, target, **taken) for model in models]
    if as_json:
        print_json(found[-1].table.to_dict())
        return
    for each in found:
        print_rows(each.rows(), False)
    new = sum(each.new for each in found)
    click.echo(f"{new} times measured now; the table is {found[-1].path}")


cli.add_command(lower)
cli.add_command(run)


@cli.command(short_help="What passes there are, and their options.")
@click.argument("name", required=False)
@common
def passes(name: str | None, as_json: bool) -> None:
    """What passes there are; with NAME: what it does and its options."""
    if name is None:
        from graphopt.jobs import describe_passes

        print_rows(describe_passes(), as_json)
        return
    from graphopt import registry
    from graphopt.pipeline import describe

    kind = registry.pass_class(name)
    if as_json:
        print_json(describe.json_schema(kind))
    else:
        click.echo(describe.help_text(kind), nl=False)


@cli.command(short_help="What targets there are.")
@click.argument("name", required=False)
@common
def targets(name: str | None, as_json: bool) -> None:
    """What targets there are; with NAME: its table, and whether this machine can run it and make its bundles."""
    from graphopt import registry
    from graphopt.jobs import describe_target

    if name is not None:
        table = describe_target(name)
        if as_json:
            print_json(table)
        else:
            from graphopt.report import tables

            tables.print_facts(tables.console(sys.stdout), table)
        return
    rows = [describe_target(each) for each in registry.targets()]
    keep = ("name", "backend", "arch", "runs here", "lowers here", "description")
    print_rows(rows if as_json else [{key: row[key] for key in keep} for row in rows], as_json)


def main() -> None:
    """Entry point of the console script."""
    # Temporary files are removed on the way out of an exception; the default action would leave them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cli.main(obj=State(command=shlex.join(["graphopt", *sys.argv[1:]])))


if __name__ == "__main__":
    main()
