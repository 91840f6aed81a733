"""The options of the backend: one frozen record, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from parvts_fx.analysis.modality import MODALITIES, VISUAL
from parvts_fx.schedules import SCHEDULES
from parvts_fx.stages import PlacedStage, Stage, check_order, counts_left, placed
from parvts_fx.torch_private import inductor_settings

SHORT_FORM = ("keep_ratio", "keep_tokens", "migration_depth", "fusion", "paths", "score", "merge")
"""The options that write a schedule of one stage at layer 0."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _fail(name: str, value: object, expected: str, remedy: str) -> None:
    raise ValueError(f"parvts_fx: option {name}={value!r}: expected {expected}. {remedy}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="parvts", options={...})`` accepts.

    Raises:
        ValueError: for a value outside its range; the message names the option, the value and what to do.
    """

    keep_ratio: float | None = None
    """Share of each sample's visual tokens in the subject group, 0 < r <= 1. None: 1/9, unless keep_tokens is given."""

    keep_tokens: int | None = None
    """A count of visual tokens per sample in place of a share; more than the sample has keeps them all."""

    migration_depth: int | float = 3
    """Decoder layers in which both groups run (K of the paper), 0 to the number of layers; or, as a float between 0 and 1,
    a share of the layers (rounded half up)."""

    fusion: str | float = "attention"
    """How text rows take in both groups: "attention", or the constant weight of the subject path in [0, 1]."""

    paths: str = "parallel"
    """With "parallel" the groups do not see each other during migration. "joint": they do (the ablation)."""

    score: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "auto"
    """A scoring rule's name, or a callable ``score(hidden, visual) -> scores``; see :mod:`parvts_fx.scores`."""

    merge: str | None = "auto"
    """What kept tokens take over of dropped ones: None for nothing, or "clusters" (:mod:`parvts_fx.passes.clusters`). "auto":
    "clusters", and None with constant weights, which leave no place for it."""

    stages: tuple[Stage, ...] | str | None = None
    """A schedule of several :class:`parvts_fx.Stage`, or the name of a published one (:mod:`parvts_fx.schedules`), in place
    of keep_ratio, keep_tokens, migration_depth, fusion, paths, score and merge, which write a schedule of one."""

    prune: str | tuple[str, ...] = "visual"
    """Whose tokens count as visual: "visual" (images, videos, and features about which nothing tells what they are), "all"
    (sound as well), or names out of "image", "video", "audio" and "unknown". All others are like text: they stay."""

    lowering: str | Callable[..., Any] = "inductor"
    """Who compiles the rewritten graph: "inductor", "eager", "aot_eager", "tensorrt", any backend's name, a callable."""

    linear_kernels: str = "auto"
    """For float32 on CPU and the lowering "inductor": "auto" measures at compile time which library is quicker for each
    large matrix product, and takes oneDNN's kernel where that is; "inductor" leaves the choice to Inductor."""

    strict: bool = False
    """Raise :class:`parvts_fx.NotRewritten` where a multimodal prefill cannot be rewritten, instead of warning."""

    skip_dead_rows: bool = True
    """Compute only the rows that something reads, in the last migration layer and in the model's last layer: the same
    result for less work."""

    share_prefix: bool = True
    """With constant weights, compute the text in front of the first visual token once for both paths, where masks keep it
    from looking ahead: the same result for less work."""

    extra_passes: tuple[Any, ...] = ()
    """Passes of your own (objects with a ``name`` and ``run(state)``), run when ours have rewritten the graph."""

    mode: str | None = None
    """As in torch.compile; handed to Inductor."""

    lowering_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Whatever else the lowering takes; Inductor's own options land here."""

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.keep_tokens is not None:
            _fail("keep_ratio", self.keep_ratio, f"only one of keep_ratio and keep_tokens (={self.keep_tokens!r})",
                  "Give one of the two.")
        if self.keep_ratio is not None and not (
            _is_number(self.keep_ratio) and math.isfinite(self.keep_ratio) and 0 < self.keep_ratio <= 1
        ):
            _fail("keep_ratio", self.keep_ratio, "a number with 0 < keep_ratio <= 1",
                  "1/9 keeps 64 of 576 visual tokens; 1 keeps all.")
        if self.keep_tokens is not None and not (_is_count(self.keep_tokens) and self.keep_tokens >= 1):
            _fail("keep_tokens", self.keep_tokens, "a positive integer", "At least one visual token must be kept.")
        depth = self.migration_depth
        if not (_is_count(depth) and depth >= 0 or isinstance(depth, float) and 0 < depth < 1):
            _fail("migration_depth", depth, "an integer from 0 to the model's number of decoder layers, or a share of them "
                  "as a float between 0 and 1", "0 prunes before the first layer; 0.5 migrates in half of the layers.")
        if not (self.fusion == "attention" if isinstance(self.fusion, str)
                else _is_number(self.fusion) and 0 <= self.fusion <= 1):
            _fail("fusion", self.fusion, '"attention" or a number in [0, 1] (the subject path\'s weight)',
                  'Use "attention" if unsure.')
        if self.paths not in ("parallel", "joint"):
            _fail("paths", self.paths, '"parallel" or "joint"', 'Use "parallel" for ParVTS.')
        if self.paths == "joint" and self.fusion != "attention":
            _fail("fusion", self.fusion, '"attention" together with paths="joint"',
                  "With joint paths there is one copy of the text rows and nothing to weigh.")
        if self.merge not in ("auto", None, "clusters"):
            _fail("merge", self.merge, '"auto", None or "clusters"', "None drops what is not kept.")
        if self.merge == "clusters" and self.fusion != "attention":
            _fail("merge", self.merge, f"None together with fusion={self.fusion!r}", "Constant weights give each path its own "
                  'copy of the text; use fusion="attention" to merge.')
        known = ("visual", "all", *MODALITIES)
        for name in _names(self.prune):
            if name not in (known if isinstance(self.prune, str) else MODALITIES):
                _fail("prune", self.prune, f"\"visual\", \"all\", or names out of {', '.join(MODALITIES)}",
                      _closest(name, known))
        if not _names(self.prune):
            _fail("prune", self.prune, "at least one modality", "Use keep_ratio=1 to keep all tokens.")
        if self.linear_kernels not in ("auto", "inductor"):
            _fail("linear_kernels", self.linear_kernels, '"auto" or "inductor"', 'Use "auto" for the quicker kernel.')
        for name in ("strict", "skip_dead_rows", "share_prefix"):
            if not isinstance(getattr(self, name), bool):
                _fail(name, getattr(self, name), "True or False", "")
        if self.mode is not None and self.mode not in MODES:
            _fail("mode", self.mode, f"one of {', '.join(MODES)}", "The modes are torch.compile's.")
        given = self.extra_passes if isinstance(self.extra_passes, (list, tuple)) else (self.extra_passes,)
        for graph_pass in given:
            works = callable(getattr(graph_pass, "run", None)) or callable(getattr(graph_pass, "plan", None))
            if not isinstance(getattr(graph_pass, "name", None), str) or not works:
                _fail("extra_passes", graph_pass, "objects with a name and a method run(work) or plan(plan)",
                      "See parvts_fx.pipeline.Pass.")
        object.__setattr__(self, "extra_passes", tuple(given))
        self._check_references()
        self._check_stages()

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        short = next((field.name for field in dataclasses.fields(self) if field.name in SHORT_FORM
                      and getattr(self, field.name) != field.default), None)
        if short is not None:
            _fail_both(short, getattr(self, short))
        if isinstance(self.stages, str):
            if self.stages not in SCHEDULES:
                _fail("stages", self.stages, f"a tuple of parvts_fx.Stage or one of {', '.join(SCHEDULES)}",
                      _closest(self.stages, SCHEDULES))
            return
        given = (self.stages,) if isinstance(self.stages, Stage) else self.stages
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(stage, Stage) for stage in given):
            _fail("stages", self.stages, "a tuple of one parvts_fx.Stage or several, or a schedule's name",
                  'stages=(Stage(at=0, keep=1/9, migrate=3, merge="clusters"),) is the default.')
        check_order(given)
        object.__setattr__(self, "stages", tuple(given))

    def _check_references(self) -> None:
        """Names that point at something registered elsewhere: rules and lowerings."""
        from parvts_fx.backends.lowering import known_lowerings
        from parvts_fx.scores import known_rules, reads_attention

        rules = [("score", self.score)] if self.stages is None or isinstance(self.stages, str) else [
            (f"stages[{number}].rule", stage.rule) for number, stage in enumerate(self.stages) if isinstance(stage, Stage)]
        for name, value, known in (
            *((name, rule, known_rules) for name, rule in rules), ("lowering", self.lowering, known_lowerings)
        ):
            if isinstance(value, str):
                if value not in known():
                    _fail(name, value, f"a callable or one of {', '.join(sorted(known()))}", _closest(value, known()))
            elif not callable(value):
                _fail(name, value, f"a callable or one of {', '.join(sorted(known()))}", "")
        for number, stage in enumerate(self.schedule if self._has_sound_stages() else ()):
            if stage.at == 0 and reads_attention(stage.rule):
                name = "score" if self.stages is None else f"stages[{number}].rule"
                _fail(name, stage.rule, "a rule that reads no attention, at layer 0", "There is no layer in front whose "
                      "attention it could read: choose at a later layer (stages=(Stage(at=2, rule=...),)).")

    def prunes(self, modality: str) -> bool:
        """Whether tokens of a modality (one of :data:`parvts_fx.analysis.modality.MODALITIES`) may be dropped."""
        return self.prune == "all" or modality in (VISUAL if self.prune == "visual" else _names(self.prune))

    def _has_sound_stages(self) -> bool:
        return self.stages is None or isinstance(self.stages, (tuple, list)) and all(
            isinstance(stage, Stage) for stage in self.stages)

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The stages, whichever way they were written."""
        if isinstance(self.stages, str):
            return SCHEDULES[self.stages]
        if self.stages is not None:
            return tuple(self.stages)
        ratio = 1 / 9 if self.keep_ratio is None else float(self.keep_ratio)
        migrates = self.migration_depth != 0
        merge = self.merge if self.merge != "auto" else "clusters" if self.fusion == "attention" else None
        return (Stage(
            at=0, keep=ratio if self.keep_tokens is None else self.keep_tokens, rule=self.score, migrate=self.migration_depth,
            paths=self.paths if migrates else "parallel", fusion=self.fusion if migrates else "attention", merge=merge),)

    def placed(self, layers: int) -> tuple[PlacedStage, ...]:
        """The stages in a decoder of so many layers.

        Raises:
            ValueError: they do not fit.
        """
        if self.stages is None and _is_count(self.migration_depth) and self.migration_depth > layers:
            _fail("migration_depth", self.migration_depth, f"at most the model's {layers} decoder layers",
                  f"Use a value from 0 to {layers}.")
        return placed(self.schedule, layers)

    def subject_count(self, visual: int) -> int:
        """Number of visual tokens that are left in the end, of ``visual`` ones (an int or a torch.SymInt)."""
        return counts_left(self.schedule, visual)[-1]

    @property
    def overwrites(self) -> bool:
        """Whether a further call may overwrite what an earlier one has returned: the memory of CUDA graphs is their own."""
        return self.mode in ("reduce-overhead", "max-autotune") or bool(self.lowering_options.get("triton.cudagraphs"))

    @property
    def keeps_all(self) -> bool:
        return all(isinstance(stage.keep, float) and stage.keep == 1 for stage in self.schedule)


def _names(given: object) -> tuple[object, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _closest(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f'Did you mean "{close[0]}"?' if close else ""


def _fail_both(name: str, value: object) -> None:
    _fail(name, value, "nothing beside stages=, which says it too", "Write the schedule in one of the two ways.")


def parse_options(given: Options | Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
    """Build :class:`Options` from a user's dict, which stays as it is.

    A key that is no field of ours goes to the lowering when Inductor knows it; any other is an error.

    Raises:
        ValueError: unknown key (the message names the closest one), or a value out of range.
    """
    if isinstance(given, Options):
        return given
    fields = {field.name for field in dataclasses.fields(Options)}
    own: dict[str, Any] = {} if mode is None else {"mode": mode}
    extra: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if key in fields:
            own[key] = value
        else:
            extra[key] = value
    if own.get("stages") is not None:
        for key in SHORT_FORM:
            if key in own:
                _fail_both(key, own[key])
    if extra:
        lowering = own.get("lowering", "inductor")
        if lowering == "inductor":
            known = inductor_settings()
            for key in extra:
                if known is not None and key.replace("-", "_") not in known:
                    raise ValueError(
                        f"parvts_fx: unknown option {key!r} (={extra[key]!r}): neither an option of parvts_fx "
                        f"({', '.join(sorted(fields))}) nor of Inductor. {_closest(key, [*fields, *known])}".rstrip()
                    )
        own["lowering_options"] = {**own.get("lowering_options", {}), **extra}
        if lowering in ("eager", "aot_eager"):
            key = next(iter(extra))
            raise ValueError(f"parvts_fx: unknown option {key!r} (={extra[key]!r}): lowering={lowering!r} takes no "
                             f"options of its own. {_closest(key, fields)}".rstrip())
    return Options(**own)
