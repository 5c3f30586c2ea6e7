"""``mlstor checkpoint``: options -> plan, or plan -> run -> record and table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlstor.checkpoint.options import Options, parse
from mlstor.errors import UsageError

if TYPE_CHECKING:
    from mlstor.checkpoint.layout import Layout
    from mlstor.checkpoint.models import Shape


def main(argv: list[str]) -> int:
    """Run ``mlstor checkpoint`` with these arguments; the exit code is 3 if damage was found."""
    from mlstor.world import said_once

    with said_once():
        options = parse(argv)
    if options.model == "help":
        return _print_models()
    if options.plan:
        return _print_plan(options)
    from mlstor.checkpoint.run import run

    return run(options, ["mlstor", "checkpoint", *argv])


def shape_of(options: Options) -> Shape:
    """The model that was asked for, by name or by workload file."""
    if (options.model is None) == (options.workload is None):
        raise UsageError("give --model MODEL or --workload FILE, one of them; `--model help` lists the models")
    if options.workload is not None:
        from mlstor.checkpoint.workload_file import from_workload_yaml

        return from_workload_yaml(options.workload)
    from mlstor.checkpoint import models

    assert options.model is not None
    return models.get(options.model)


def layout_of(options: Options, nprocs: int) -> Layout:
    """The layout of logical ranks over files that was asked for."""
    from mlstor.checkpoint.layout import Layout

    return Layout(shape_of(options), options.ranks, options.subset, options.scale, nprocs)


def _print_models() -> int:
    from mlstor.checkpoint.models import MODELS

    width = max(map(len, MODELS))
    for name, shape in MODELS.items():
        print(f"{name:<{width}}  {shape.nparameters / 1e9:8.1f} G parameters, {shape.nranks:4} ranks")
    return 0


def _print_plan(options: Options) -> int:
    from mlstor.checkpoint.deal import parse_ranks
    from mlstor.checkpoint.plan import Plan, plan_json, print_plan
    from mlstor.checkpoint.profiles import PROFILES
    from mlstor.settings import Settings

    layout = layout_of(options, 1)
    only = None if options.only_ranks is None else parse_ranks(options.only_ranks, layout.nranks)
    settings = Settings.resolve(block_bytes=options.block_bytes, depth=options.depth, workers=options.workers)
    plan = Plan(
        layout,
        writes=options.writes or 0,
        nhosts=options.hosts or 1,
        how=options.deal,
        only=only,
        staging_nbytes=PROFILES[options.profile].staging_nbytes(settings, 1),
    )
    if options.json:
        print(plan_json(plan))
    else:
        from rich.console import Console

        print_plan(plan, Console(highlight=False))
    return 0
