"""lm-eval's command line with one more model, ``parvts``: its ``hf-multimodal``, compiled.

::

    python -m parvts_fx.evaluation.lm_eval_model run --model parvts --model_args pretrained=FOLDER_OR_HUB_NAME,keep_ratio=1/9 ...

lm-eval has a registry of model classes and loads none from elsewhere by itself: whoever adds one imports its module and hands
over to lm-eval's own command, as here.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM

from parvts_fx.evaluation.pruned import Pruned


@register_model("parvts")
class PrunedMultimodalLM(Pruned, HFMultimodalLM):
    """Takes the arguments of ``hf-multimodal`` and the options of parvts_fx."""


if __name__ == "__main__":
    cli_evaluate()
