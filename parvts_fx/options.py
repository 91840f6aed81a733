"""The options of the backend: one frozen record, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from parvts_fx.analysis.modality import MODALITIES, VISUAL

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
            if not isinstance(getattr(graph_pass, "name", None), str) or not callable(getattr(graph_pass, "run", None)):
                _fail("extra_passes", graph_pass, "objects with a name and a method run(state)",
                      "See parvts_fx.passes.base.Pass.")
        object.__setattr__(self, "extra_passes", tuple(given))
        self._check_references()

    def _check_references(self) -> None:
        """Names that point at something registered elsewhere: rules and lowerings."""
        from parvts_fx.backends.lowering import known_lowerings
        from parvts_fx.scores import known_rules

        for name, known in (("score", known_rules), ("lowering", known_lowerings)):
            value = getattr(self, name)
            if isinstance(value, str):
                if value not in known():
                    _fail(name, value, f"a callable or one of {', '.join(sorted(known()))}", _closest(value, known()))
            elif not callable(value):
                _fail(name, value, f"a callable or one of {', '.join(sorted(known()))}", "")

    def prunes(self, modality: str) -> bool:
        """Whether tokens of a modality (one of :data:`parvts_fx.analysis.modality.MODALITIES`) may be dropped."""
        return self.prune == "all" or modality in (VISUAL if self.prune == "visual" else _names(self.prune))

    def subject_count(self, visual: int) -> int:
        """Number of subject tokens among ``visual`` visual tokens (round half up, at least one).

        ``visual`` may be a torch.SymInt; the result then is one too.
        """
        if self.keep_tokens is not None:
            return torch.sym_min(visual, self.keep_tokens)
        ratio = 1 / 9 if self.keep_ratio is None else self.keep_ratio
        if isinstance(visual, int):
            return max(1, math.floor(ratio * visual + 0.5))
        share = ratio * torch.sym_float(visual) + 0.5  # the same arithmetic; sym_int rounds towards zero
        return torch.sym_max(1, torch.sym_int(share))

    def for_layers(self, count: int) -> Options:
        """The options for a decoder of ``count`` layers: the migration depth as a number of layers."""
        if not isinstance(self.migration_depth, float):
            return self
        return dataclasses.replace(self, migration_depth=math.floor(self.migration_depth * count + 0.5))

    @property
    def keeps_all(self) -> bool:
        return self.keep_ratio == 1


def _names(given: object) -> tuple[object, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _closest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f'Did you mean "{close[0]}"?' if close else ""


def parse_options(given: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
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
    if extra:
        lowering = own.get("lowering", "inductor")
        if lowering == "inductor":
            known = torch._inductor.list_options()
            for key in extra:
                if key.replace("-", "_") not in known:
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
