"""lmms-eval's models once more, compiled: ``parvts_llava_hf`` is its ``llava_hf``, and so on for each that it comes with.

::

    lmms-eval --model parvts_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,keep_ratio=1/9 ...

lmms-eval finds them by the entry point "lmms_eval.models", wherever this package is installed. A model is loaded, prompted and
asked by lmms-eval's own class, so that nothing here knows an architecture. A class that holds no torch module (a client of a
server, say) cannot be compiled, which is a TypeError that says so.
"""

from __future__ import annotations

from typing import Any

from lmms_eval import models
from lmms_eval.models.registry_v2 import ModelManifest

from parvts_fx.evaluation.pruned import Pruned

_SIMPLE, _CHAT = "simple_", "chat_"


def manifests() -> list[ModelManifest]:
    """What lmms-eval shall know of: under each name the classes of both kinds, where there are both."""
    simple, chat = models.AVAILABLE_SIMPLE_MODELS.keys(), models.AVAILABLE_CHAT_TEMPLATE_MODELS.keys()
    return [
        ModelManifest(f"parvts_{name}", simple_class_path=f"{__name__}.{_SIMPLE}{name}" if name in simple else None,
                      chat_class_path=f"{__name__}.{_CHAT}{name}" if name in chat else None)
        for name in sorted(simple | chat)]


def __getattr__(path: str) -> type:
    """The class that a manifest names, made when it is asked for: importing all models would import all that they need."""
    for kind in (_SIMPLE, _CHAT):
        if path.startswith(kind):
            base: Any = models.get_model(path.removeprefix(kind), force_simple=kind == _SIMPLE)
            return type(f"Pruned{base.__name__}", (Pruned, base), {"__doc__": f"{base.__name__} with the options of parvts_fx."})
    raise AttributeError(path)
