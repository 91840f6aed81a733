"""Model classes for the command lines of lm-eval and lmms-eval, so that their tasks score a compiled model.

Neither package is needed for anything else, and ``parvts_fx`` itself imports nothing of this. :mod:`parvts_fx.evaluation.pruned`
is what goes in front of a class of theirs; :mod:`parvts_fx.evaluation.lm_eval_model` and
:mod:`parvts_fx.evaluation.lmms_eval_models` tell the two packages of the classes that come of it.
"""
