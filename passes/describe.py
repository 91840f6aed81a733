"""A plan in words: for every layer which rows run, who sees whom, where rows leave, and what the caches hold."""

from __future__ import annotations

from parvts_fx.analysis.values import hint
from parvts_fx.passes.merge_clusters import steps
from parvts_fx.passes.plan import Plan
from parvts_fx.report import LayerReport


def layer_reports(plan: Plan) -> tuple[LayerReport, ...]:
    """One for each layer of the decoder."""
    return tuple(_layer_report(plan, index) for index in range(len(plan.layers)))


def merging(plan: Plan) -> tuple[str, ...]:
    """For each stage that merges dropped tokens into kept ones: what takes part in it."""
    return tuple(steps(one) for one in plan.mergings.values())


def _layer_report(plan: Plan, index: int) -> LayerReport:
    layer = plan.layers[index]
    kinds = ", ".join(dict.fromkeys(attention.kind for attention in layer.attentions)) or "no attention"
    others = tuple(mixer.output.name for mixer in layer.mixers if mixer.attention is None)
    level = sum(stage.end <= index for stage in plan.stages)
    running = next((stage for stage in plan.stages if stage.runs_both(index)), None)
    text, left = hint(plan.text_count), hint(plan.visual_counts[level])
    if running is None:
        rows, sees = {"kept" if level else "all": text + left}, "all see all"
    else:
        subject = hint(plan.visual_counts[level + 1])
        rows = {"text": text, "subject": subject, "non-subject": left - subject}
        sees = "text sees all, a group its own and text"
        if running.is_weighed:
            rows = {"subject path": text + subject, "non-subject path": text + left - subject}
            sees = f"each path its own; text joins {running.stage.weight:g} to {1 - running.stage.weight:g}"
        elif not running.is_parallel:
            rows, sees = {"all": text + left}, "all see all"
    leaving = sum(hint(plan.visual_counts[stage.number]) - hint(plan.visual_counts[stage.number + 1])
                  for stage in plan.stages if stage.end == index)
    chooses = next((rule_name(stage.stage.rule) for stage in plan.stages if stage.at == index), "")
    return LayerReport(layer.index, kinds, rows, others, sees, leaving, chooses)


def rule_name(rule: object) -> str:
    return rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)


def describe(plan: Plan) -> str:
    """The plan as text, one line a layer."""
    lines = []
    for report in layer_reports(plan):
        rows = ", ".join(f"{name} {count}" for name, count in report.rows.items())
        left = f"; {report.leaving} rows have left in front" if report.leaving else ""
        chosen = f"; tokens are chosen by {report.chooses}" if report.chooses else ""
        lines.append(f"layer {report.index}: {rows}: {report.sees}{left}{chosen}")
    lines += [f"dropped tokens are merged: {text}" for text in merging(plan)]
    kept = hint(plan.row_count(plan.final))
    fewer = {level: sum(found == level for found in plan.levels.values()) for level in sorted(set(plan.levels.values()))}
    lines.append(f"caches of all layers: {kept} rows; logits: {plan.take_count or kept} rows")
    lines += [f"operations on level {level}: {count}" for level, count in fewer.items()]
    return "\n".join(lines)
