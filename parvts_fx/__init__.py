"""ParVTS visual-token pruning (arXiv 2511.18875) for any multimodal language model, as a torch.compile backend.

``torch.compile(model, backend="parvts")`` works without importing this package. Importing it changes nothing in torch.
"""

from parvts_fx.api import compile, explain, override, uncompile
from parvts_fx.errors import NotRewritten, ParvtsWarning, Refusal
from parvts_fx.options import Options
from parvts_fx.patches import show
from parvts_fx.rewriting import rewrite
from parvts_fx.runtime.record import CallRecord, last_call
from parvts_fx.scores import LookAhead, register_rule
from parvts_fx.stages import Stage

__all__ = [
    "CallRecord", "LookAhead", "NotRewritten", "Options", "ParvtsWarning", "Refusal", "Stage", "compile", "explain", "last_call",
    "override", "register_rule", "rewrite", "show", "uncompile",
]
__version__ = "0.1.0"
