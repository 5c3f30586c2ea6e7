"""``mlstor checkpoint``: options -> plan, or plan -> run -> record and table."""

from __future__ import annotations

from mlstor.checkpoint.options import Options, parse

# The plan's tables are wider than the 80 columns that a pipe is taken to have; a terminal's names are folded to fit.
_PIPE_COLUMNS = 100
_LEAST_COLUMNS = 80


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

    layout = options.layout(1)
    only = None if options.only_ranks is None else parse_ranks(options.only_ranks, layout.nranks)
    settings = Settings.resolve(block_bytes=options.block_bytes, depth=options.depth, workers=options.workers)
    ranks = range(layout.nranks) if only is None else only
    if options.via is None:
        largest_nbytes = max((file.nbytes for rank in ranks for file in layout.files(rank)), default=0)
        process_nbytes = PROFILES[options.profile].process_nbytes(settings, 1, largest_nbytes)
    else:
        from mlstor.checkpoint.via_site import memory_nbytes

        process_nbytes = memory_nbytes(max(map(layout.rank_nbytes, ranks), default=0))
    plan = Plan(
        layout,
        writes=options.writes or 0,
        nhosts=1 if options.hosts is None else options.hosts,
        how=options.deal,
        only=only,
        process_nbytes=process_nbytes,
    )
    if options.json:
        print(plan_json(plan))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.width = max(console.width, _LEAST_COLUMNS if console.is_terminal else _PIPE_COLUMNS)
        print_plan(plan, console)
    return 0
