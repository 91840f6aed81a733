"""``parvts_fx.rewrite`` on graphs from elsewhere than Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import parvts_fx
from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.reference import relative_error

OPTIONS = dict(keep_tokens=3, migration_depth=1)


class Prefill(torch.nn.Module):
    """Merge, decoder and head of a LLaVA, without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(ids)
        merged = embeddings.masked_scatter((ids == llava.IMAGE_TOKEN)[..., None], features)
        text = llava.text_model(self.model)
        return self.model.lm_head(text(inputs_embeds=merged, attention_mask=mask, use_cache=False).last_hidden_state)


def exported(prefill: Prefill, given: tuple[torch.Tensor, ...]) -> tuple[GraphModule, tuple[Any, ...]]:
    return torch.export.export(prefill, given).module(), given


def exported_with_parameters(prefill: Prefill, given: tuple[torch.Tensor, ...]) -> tuple[GraphModule, tuple[Any, ...]]:
    """Whose weights are inputs of the graph."""
    program = torch.export.export(prefill, given)
    held, inputs = {**program.state_dict, **program.constants}, iter(given)
    return program.graph_module, tuple(
        next(inputs) if spec.target is None else held[spec.target] for spec in program.graph_signature.input_specs)


def at_aten_level(prefill: Prefill, given: tuple[torch.Tensor, ...]) -> tuple[GraphModule, tuple[Any, ...]]:
    """With the attention kernels of this device."""
    return make_fx(prefill, tracing_mode="fake", _allow_non_fake_inputs=True)(*given), given


def at_aten_level_with_dynamic_sizes(prefill: Prefill, given: tuple[torch.Tensor, ...]) -> tuple[GraphModule, tuple[Any, ...]]:
    return make_fx(prefill, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given), given


def before_dispatch(prefill: Prefill, given: tuple[torch.Tensor, ...]) -> tuple[GraphModule, tuple[Any, ...]]:
    return make_fx(prefill, tracing_mode="fake", _allow_non_fake_inputs=True, pre_dispatch=True)(*given), given


def with_real_tensors(prefill: Prefill, given: tuple[torch.Tensor, ...]) -> tuple[GraphModule, tuple[Any, ...]]:
    """Attention written out: the library asks a mask's data otherwise, which no trace can answer."""
    prefill.model.set_attn_implementation("eager")
    return make_fx(prefill, tracing_mode="real")(*given), given


CAPTURES = [exported, exported_with_parameters, at_aten_level, at_aten_level_with_dynamic_sizes, before_dispatch,
            with_real_tensors]


@pytest.mark.supports("Graphs", "parvts_fx.rewrite on graphs from torch.export, with weights as inputs or without, and make_fx")
@pytest.mark.parametrize("rows", [[[3, "image", 5]], [[3, "image", 5], [2, "image", 6]]], ids=["one", "two"])
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture.__name__)
@torch.no_grad()
def test_graphs(capture: Callable, rows: list) -> None:
    model = llava.build(layers=2).requires_grad_(False)
    prompt = llava.prompt(model, rows)
    wanted = expected(model, prompt, **OPTIONS)
    features = model.get_image_features(prompt.inputs["pixel_values"]).pooler_output
    features = torch.cat([*features]).reshape(-1, 48)
    given = prompt.inputs["input_ids"], features, prompt.inputs["attention_mask"]
    plain = Prefill(model)(*given)
    module, inputs = capture(Prefill(model), given)
    result = parvts_fx.rewrite(module, inputs, {**OPTIONS, "strict": True})
    assert result.meta["parvts_fx"].status == "rewritten" and result.meta["parvts_fx_precondition"](*inputs)
    (logits,) = torch.utils._pytree.tree_leaves(result(*inputs))
    assert max(relative_error(ours, own.logits) for ours, own in zip(logits, wanted, strict=True)) <= TOLERANCE
    (whole,) = torch.utils._pytree.tree_leaves(module(*inputs))
    assert relative_error(whole, plain) <= TOLERANCE, "the graph that was given stays"
