"""The graph passes and the pipeline that they form."""

from __future__ import annotations

from parvts_fx.options import Options
from parvts_fx.passes.base import Pass, PassRecord, PassResult, State, run_pipeline
from parvts_fx.passes.duplicate_attention import DuplicateAttention
from parvts_fx.passes.duplicate_layers import DuplicateLayers
from parvts_fx.passes.insert_partition import InsertPartition
from parvts_fx.passes.keep_last_rows import KeepLastRows
from parvts_fx.passes.prune_branch import PruneBranch
from parvts_fx.passes.remove_dead_code import RemoveDeadCode
from parvts_fx.passes.share_prefix import SharePrefix
from parvts_fx.passes.skip_dead_rows import SkipDeadRows


def build_pipeline(options: Options) -> tuple[Pass, ...]:
    """The passes for these options, in order."""
    passes: list[Pass] = [InsertPartition(options)]
    attention = options.fusion == "attention"
    early = options.skip_dead_rows and attention and options.migration_depth > 0
    if options.migration_depth > 0 and options.paths == "parallel":
        if options.share_prefix and not attention:
            passes.append(SharePrefix())
        passes.append(DuplicateAttention(leave_last=early) if attention else DuplicateLayers(options.skip_dead_rows))
    if early:
        passes.append(SkipDeadRows(options.paths))
    passes.append(PruneBranch(options.fusion))
    if options.skip_dead_rows:
        passes.append(KeepLastRows())
    passes += [*options.extra_passes, RemoveDeadCode()]
    return tuple(passes)


__all__ = [
    "DuplicateAttention", "DuplicateLayers", "InsertPartition", "KeepLastRows", "Pass", "PassRecord", "PassResult",
    "PruneBranch", "RemoveDeadCode", "SharePrefix", "SkipDeadRows", "State", "build_pipeline", "run_pipeline",
]
