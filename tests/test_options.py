"""Bad input: a ValueError that names option, value and remedy; and what must stay as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import parvts_fx
from parvts_fx.options import Options, parse_options
from tests import llava
from tests.comparing import uncompile


@pytest.fixture(scope="module")
def model():
    return llava.build(layers=2)


@pytest.fixture(autouse=True)
def left_as_it_was(model):
    yield
    uncompile(model)


BAD = [
    ({"keep_ratio": 0}, "keep_ratio=0"), ({"keep_ratio": -0.1}, "keep_ratio=-0.1"), ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
    ({"keep_ratio": math.nan}, "keep_ratio=nan"), ({"keep_ratio": "half"}, "keep_ratio='half'"),
    ({"keep_ratio": True}, "keep_ratio=True"), ({"keep_tokens": 0}, "keep_tokens=0"), ({"keep_tokens": 2.5}, "keep_tokens=2.5"),
    ({"keep_ratio": 0.5, "keep_tokens": 3}, "only one of keep_ratio and keep_tokens"),
    ({"migration_depth": -1}, "migration_depth=-1"), ({"migration_depth": 1.0}, "migration_depth=1.0"),
    ({"fusion": "mean"}, "fusion='mean'"), ({"fusion": 1.2}, "fusion=1.2"), ({"fusion": math.nan}, "fusion=nan"),
    ({"fusion": None}, "fusion=None"), ({"paths": "serial"}, "paths='serial'"),
    ({"paths": "joint", "fusion": 0.5}, "fusion=0.5"), ({"score": "norms"}, 'Did you mean "norm"'),
    ({"score": 3}, "score=3"), ({"lowering": "inducktor"}, 'Did you mean "inductor"'), ({"lowering": None}, "lowering=None"),
    ({"strict": "yes"}, "strict='yes'"), ({"keep_rato": 0.5}, 'Did you mean "keep_ratio"'),
    ({"lowering": "eager", "max_autotune": True}, "takes no"), ({"mode": "fast"}, "mode='fast'"),
    ({"extra_passes": [print]}, "extra_passes="),
]


@pytest.mark.parametrize("given, named", BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_options_at_the_call(model, given, named):
    before = copy.copy(given)
    with pytest.raises(ValueError) as error:
        parvts_fx.compile(model, **given)
    assert named in str(error.value) and "parvts_fx" in str(error.value)
    assert given == before and model._compiled_call_impl is None


@pytest.mark.parametrize("given, named", [case for case in BAD if "mode" not in case[0]][::4])
def test_bad_options_through_torch_compile(model, given, named):
    """torch.compile hands options to a backend only when it compiles; the error is ours, without Dynamo's wrapping."""
    fast = torch.compile(model, backend="parvts", options=given)
    with torch.no_grad(), pytest.raises(ValueError) as error:
        fast(**llava.prompt(model, [[1, "image", 1]]).inputs)
    assert type(error.value) is ValueError and named in str(error.value)


@pytest.mark.supports("Options", "migration depth as a share of the layers")
@pytest.mark.parametrize("share, layers", [(0.5, 1), (0.9, 2), (0.2, 0)])
def test_migration_depth_as_a_share(model, share, layers):
    with torch.no_grad():
        model(**llava.prompt(model, [[1, "image", 2]]).inputs)  # transformers' hooks would break the first graph
    report = parvts_fx.explain(model, **llava.prompt(model, [[1, "image", 2]]).inputs, options={"migration_depth": share})
    assert report.prefill.migration_depth == layers
    assert [set(layer.rows) != {"kept"} for layer in report.prefill.layers] == [True] * layers + [False] * (2 - layers)
    (stage,) = parvts_fx.Options(migration_depth=share).placed(32)
    assert (stage.at, stage.end) == (0, round(32 * share))


def test_migration_depth_beyond_the_layers(model):
    model.compile(backend="parvts", options={"migration_depth": 3, "lowering": "eager"})
    with torch.no_grad(), pytest.raises(ValueError, match="migration_depth=3.*2 decoder layers"):
        model(**llava.prompt(model, [[1, "image", 1]]).inputs)


def no_tensor(hidden, visual):
    return 1.0


def wrong_shape(hidden, visual):
    return hidden.sum(-1)[:, :-1]


def one_per_batch(hidden, visual):
    return hidden.sum((1, 2))


def complex_scores(hidden, visual):
    return hidden.sum(-1).to(torch.complex64)


def looks_at_values(hidden, visual):
    return hidden.sum(-1) if hidden.sum() > 0 else -hidden.sum(-1)


def data_dependent(hidden, visual):
    return hidden[visual].sum(-1).expand(visual.shape)


def takes_too_much(hidden, visual, more):
    return hidden.sum(-1)


@pytest.mark.parametrize("score, told", [
    (no_tensor, "returned float"), (wrong_shape, "must return"), (one_per_batch, "must return"),
    (complex_scores, "complex64"), (looks_at_values, "cannot be traced"), (data_dependent, "cannot be traced"),
    (takes_too_much, "cannot be traced"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_bad_scores(model, score, told):
    parvts_fx.compile(model, score=score, migration_depth=1, lowering="eager")
    with torch.no_grad(), pytest.raises(ValueError) as error:
        model(**llava.prompt(model, [[1, "image", 1]]).inputs)
    assert told in str(error.value) and score.__name__ in str(error.value) and "option score" in str(error.value)


@pytest.mark.versions
def test_options_of_inductor_pass_through():
    options = parse_options({"max_autotune": False, "keep_ratio": 0.5}, mode="reduce-overhead")
    assert options.lowering_options == {"max_autotune": False} and options.mode == "reduce-overhead"


def test_the_users_dict_stays_as_it_is(model):
    given = {"keep_ratio": 0.25, "migration_depth": 1, "lowering": "eager", "score": "norm"}
    before = copy.deepcopy(given)
    model.compile(backend="parvts", options=given)
    with torch.no_grad():
        model(**llava.prompt(model, [[1, "image", 1]]).inputs)
    assert given == before


@pytest.mark.parametrize("visual, ratio, count", [
    (576, 1 / 9, 64), (9, 1 / 6, 2), (1, 0.01, 1), (10, 0.25, 3), (10, 0.24, 2), (7, 1, 7)])
def test_subject_count_rounds_half_up(visual, ratio, count):
    assert Options(keep_ratio=ratio).subject_count(visual) == count


def test_options_of_torch_are_never_changed(model):
    """Dynamo's, Inductor's and functorch's settings, before and after a compile."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    def settings():
        return [module.get_config_copy() for module in (torch._dynamo.config, inductor, functorch)]

    before = settings()
    parvts_fx.compile(model, migration_depth=1, lowering="eager")
    with torch.no_grad():
        model(**llava.prompt(model, [[1, "image", 1]]).inputs)
    parvts_fx.explain(model, **llava.prompt(model, [[1, "image", 1]]).inputs, options={"migration_depth": 1})
    assert settings() == before
