"""The passes, and the pipeline that they form: plan what runs on which rows, write the graph, clean up."""

from __future__ import annotations

from parvts_fx.options import Options
from parvts_fx.passes.drop_dead_rows import DropDeadRows
from parvts_fx.passes.duplicate_attention import DuplicateAttention
from parvts_fx.passes.duplicate_layers import DuplicateLayers
from parvts_fx.passes.emit import Emit
from parvts_fx.passes.insert_partition import InsertPartition
from parvts_fx.passes.merge_clusters import MergeClusters
from parvts_fx.passes.plan import Plan, PlanError
from parvts_fx.passes.prune_branch import PruneBranch
from parvts_fx.passes.remove_dead_code import RemoveDeadCode
from parvts_fx.passes.share_prefix import SharePrefix
from parvts_fx.pipeline import GraphPass, Pass, PassRecord, PassResult, PlanPass, Work, run_pipeline


def build_pipeline(options: Options) -> tuple[Pass, ...]:
    """The passes for these options, in order."""
    stages = options.schedule
    passes: list[Pass] = [InsertPartition()]
    if any(stage.migrate and stage.paths == "parallel" and stage.fusion == "attention" for stage in stages):
        passes.append(DuplicateAttention())
    if any(stage.migrate and stage.fusion != "attention" for stage in stages):
        passes.append(DuplicateLayers())
        if options.share_prefix:
            passes.append(SharePrefix())
    if any(stage.merge for stage in stages):
        passes.append(MergeClusters())
    passes.append(PruneBranch())
    if options.skip_dead_rows:
        passes.append(DropDeadRows())
    planned = [given for given in options.extra_passes if hasattr(given, "plan")]
    written = [given for given in options.extra_passes if not hasattr(given, "plan")]
    return (*passes, *planned, Emit(), *written, RemoveDeadCode())


__all__ = [
    "DropDeadRows", "DuplicateAttention", "DuplicateLayers", "Emit", "GraphPass", "InsertPartition", "MergeClusters", "Pass",
    "PassRecord", "PassResult", "Plan", "PlanError", "PlanPass", "PruneBranch", "RemoveDeadCode", "SharePrefix", "Work",
    "build_pipeline", "run_pipeline",
]
