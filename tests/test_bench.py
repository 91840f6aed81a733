"""The comparison benchmark: methods that must agree do, and what is measured is what it says."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import compare, figures, gpu, merging_cost, picture_sizes, schedules, together, uneven_batches
from bench.configurations import SMALL
from bench.demo import build_model
from bench.floor import Floor, decoder_weights
from bench.measuring import Company, answer, build, many_compiles, peak_memory
from bench.methods import Method, methods, nothing
from bench.models import Prefill, Scene, build_scene, cache_bytes
from bench.tables import Sheet, markdown
from parvts_fx.schedules import SCHEDULES
from parvts_fx.scores import rule_named
from parvts_fx.stages import placed
from tests import reference

LAYERS, WIDTH, VISUAL, KEPT, DEPTH = 3, 128, 36, 9, 2
TEXT = 64
TOLERANCE = 2e-5
METHODS = {method.name: method for method in methods(DEPTH)}
AT_DEFAULT_DEPTH = {method.name: method for method in methods()}


@pytest.fixture(autouse=True)
def as_the_benchmark_runs():
    with torch.no_grad(), many_compiles():
        yield


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(1)
    found = build_model(LAYERS, WIDTH).requires_grad_(False)
    for parameter in found.model.language_model.layers.parameters():
        if parameter.dim() == 2:  # so large that attention is far from even, and every token matters
            parameter.data.normal_(0, 0.15)
    return found


@pytest.fixture(scope="module")
def scene(model: torch.nn.Module) -> Scene:
    return build_scene(model, VISUAL, 2)


def run(method: Method, scene: Scene, kept: int) -> tuple[torch.Tensor, Any]:
    return build(method, scene, kept, backend=nothing).run_prefill()


# -- methods ----------------------------------------------------------------------------------------------------------


def test_the_prefill_is_the_models_own(model: torch.nn.Module):
    scene = build_scene(model, 2 * 576)
    expected = model(input_ids=scene.ids, pixel_values=scene.pixels).logits[:, -1]
    assert scene.pixels.shape[0] == 2
    assert reference.relative_error(Prefill(model)(*scene.inputs)[0], expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS[name] for name in (
    "eager", "inductor", "downsampled image", "random", "FastV", "PyramidDrop", "parvts")], ids=lambda method: method.name)
def test_keeping_all_is_the_full_model(method: Method, scene: Scene):
    expected, _ = Prefill(scene.model)(*scene.inputs)
    logits, cache = run(method, scene, VISUAL)
    assert reference.relative_error(logits, expected) <= TOLERANCE
    assert [layer.keys.shape[2] for layer in cache.layers] == [TEXT + VISUAL] * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_cached(method: Method, scene: Scene):
    _, cache = run(method, scene, KEPT)
    rows = TEXT + (VISUAL if method.keeps_all else KEPT)
    assert [layer.keys.shape[2] for layer in cache.layers] == [rows] * LAYERS
    assert cache_bytes(cache) >= scene.batch * LAYERS * rows * WIDTH * 2 * 4


def hide(scene: Scene, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of the eager model whose layers from ``first`` on see the given rows [batch, rows] alone."""
    seen = torch.zeros(scene.ids.shape, dtype=torch.bool).scatter(1, rows, True)
    mask = seen[:, None, None] & torch.ones(scene.prompt, scene.prompt, dtype=torch.bool).tril()
    hooks = [layer.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask}),
                                             with_kwargs=True)
             for layer in scene.model.model.language_model.layers[first:]]
    try:
        return Prefill(scene.model)(*scene.inputs)[0]
    finally:
        for hook in hooks:
            hook.remove()


def rows_with(scene: Scene, chosen: torch.Tensor) -> torch.Tensor:
    """Positions of text and of chosen visual tokens, in order; chosen [batch, kept] counts visual tokens from 0."""
    everywhere = torch.arange(scene.prompt).expand(scene.batch, -1)
    before, after = everywhere[:, :scene.first_visual], everywhere[:, scene.first_visual + scene.visual:]
    return torch.cat([before, chosen.sort(-1).values + scene.first_visual, after], 1)


def test_a_random_choice_is_the_model_that_sees_no_other_token(scene: Scene):
    visual = scene.ids == scene.model.config.image_token_id
    ranked = rule_named("random")(torch.empty(*visual.shape, 1), visual)
    chosen = ranked[:, scene.first_visual:scene.first_visual + VISUAL].topk(KEPT).indices
    logits, _ = run(METHODS["random"], scene, KEPT)
    assert reference.relative_error(logits, hide(scene, rows_with(scene, chosen), 0)) <= TOLERANCE


def test_fastv_keeps_the_tokens_with_most_attention(scene: Scene):
    """Behind its second layer, those that the last row attends to most there: transformers' own maps say which."""
    eager = copy.deepcopy(scene.model)
    eager.set_attn_implementation("eager")
    merged = Prefill(scene.model).merge(*scene.inputs)
    maps = eager.model.language_model(inputs_embeds=merged, output_attentions=True).attentions
    received = maps[1][:, :, -1, scene.first_visual:scene.first_visual + VISUAL].mean(1)
    expected = hide(scene, rows_with(scene, received.topk(KEPT).indices), 2)
    logits, _ = run(METHODS["FastV"], scene, KEPT)
    assert reference.relative_error(logits, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PyramidDrop", "joint", "diverse", "parvts", "parvts, not merged", "parvts fusion 0.5"])
def test_schedules_compute_what_the_reference_does(name: str, scene: Scene):
    text, stages = scene.model.model.language_model, METHODS[name].stages(KEPT)
    expected = reference.prefill(
        Prefill(scene.model), text.layers, lambda hidden: scene.model.lm_head(text.norm(hidden)),
        {"ids": scene.ids, "features": scene.features}, scene.ids == scene.model.config.image_token_id, stages=stages)
    logits, _ = run(METHODS[name], scene, KEPT)
    assert reference.relative_error(logits, torch.stack([sample.logits[-1] for sample in expected])) <= TOLERANCE


@pytest.mark.slow
def test_answers_are_the_models_greedy_ones(scene: Scene):
    built = Company(nothing).join(build(METHODS["parvts"], scene, VISUAL, backend=nothing))
    _, tokens = answer(built, 4)
    merged = Prefill(scene.model).merge(*scene.inputs)
    expected = scene.model.generate(inputs_embeds=merged, attention_mask=torch.ones_like(scene.ids), max_new_tokens=4,
                                    min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.tolist() == expected.tolist()


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FastV", "parvts"])
def test_the_floor_computes_what_the_graph_does(name: str, scene: Scene):
    built = build(METHODS[name], scene, KEPT, backend=nothing)
    floor = Floor(built.graph, decoder_weights(scene.model))
    targets = [node.target for node in built.graph.graph.nodes if node.op == "call_function"]
    attentions = targets.count(torch.nn.functional.scaled_dot_product_attention)
    linears = targets.count(torch._C._nn.linear)
    assert sum(call.is_attention for call in floor.calls) == attentions >= LAYERS
    weights = {weight.data_ptr() for weight in decoder_weights(scene.model)}
    read = [args[1].data_ptr() for _, args, _ in floor.bound if args[1].data_ptr() in weights]
    assert len(read) == linears
    assert len(set(read)) == 7 * LAYERS + 1  # every layer reads weights of its own
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        floor()
    outer = 2 * scene.batch * WIDTH * scene.prompt * LAYERS  # the rotary angles, in the graph's count alone
    assert 0 <= built.flops - counter.get_total_flops() <= outer


def test_peak_memory_is_what_was_held_at_once():
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        first, second = torch.empty(1_000_000), torch.empty(2_000_000)
        del first
        third = torch.empty(500_000)
        return second, third

    assert peak_memory(call, torch.device("cpu")) == 12_000_000


TINY = ["--short", "--lowering", "eager", "--layers", "3", "--width", "128", "--visual", "16", "--kept", "4",
        "--sweep", "4", "--lengths", "9", "--methods", "eager", "inductor", "parvts", "--depth", "2", "--repeats", "1",
        "--tokens", "2"]


@pytest.mark.slow
def test_a_whole_run_writes_every_column(tmp_path):
    compare.main([*TINY, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "compare.json").read_text())
    assert {"processor", "threads", "torch", "transformers"} <= set(written["methods"]["machine"])
    written = {name: held["rows"] for name, held in written.items()}
    assert [row["method"] for row in written["methods"]] == ["eager", "inductor", "parvts"]
    for row in written["methods"]:
        missing = [name for name, held in row.items() if held is None]
        assert missing == (["compile_seconds"] if row["method"] == "eager" else [])
        assert row["peak_memory"] >= row["cache_bytes"] > 0
        assert row["whole"]["median"] > row["first_token"]["median"] > row["prefill"]["median"] > 0
    assert [(row["asked"], row["method"]) for row in written["kept"]] == [(4, "inductor"), (4, "parvts")]
    assert [(row["visual"], row["method"]) for row in written["lengths"]] == [(9, "inductor"), (9, "parvts")]
    assert all(row["step"]["median"] > 0 for row in written["lengths"])
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "prefill_by_kept.png", "by_length.png"}
    again = compare.main(["kept", *TINY, "--out", str(tmp_path), "--sweep", "5"])  # the others stay
    assert [row["asked"] for row in again["kept"]["rows"]] == [5, 5] and again["methods"]["rows"] == written["methods"]


@pytest.mark.parametrize(["arguments", "complaint"], [
    (["--width", "100"], "multiple of 64"), (["--kept", "577"], "cannot keep 577 of 576"),
    (["--lengths", "36"], "cannot keep 64 of 36"), (["--layers", "2"], "must be more than 2"),
    (["--methods", "eager", "parvts"], "inductor and parvts must be among them"),
])
def test_arguments_that_make_no_sense(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture, tmp_path):
    with pytest.raises(SystemExit):
        compare.parse_arguments([*arguments, "--out", str(tmp_path)])
    assert complaint in capsys.readouterr().err


# -- bench.schedules, tables ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_named_schedule_beside_inductor(tmp_path):
    path = tmp_path / "schedules.json"
    schedules.main(["--layers", "2", "--width", "64", "--visual", "36", "--kept", "4", "--lowering", "eager", "--repeats", "1",
                    "--out", str(path)])
    whole, *rows = json.loads(path.read_text())["rows"]
    assert (whole["method"], whole["kept"], whole["flops_share"]) == ("inductor", 36, 1)
    assert [row["method"] for row in rows] == list(SCHEDULES)
    for row in rows:
        assert row["kept"] == row["stages"][-1]["keep"] == 4 and row["prefill"]["median"] > 0
    assert {row["method"] for row in rows if row["flops_share"] < 1} >= {"fastv", "pyramiddrop", "random", "uniform"}


@pytest.mark.parametrize("layers", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fit_models_of_any_depth(name: str, layers: int):
    found = schedules.fitted(SCHEDULES[name], layers)
    assert all(0 <= stage.at < layers and stage.at + stage.migrate <= layers for stage in found)
    if layers >= 16:
        given = placed(SCHEDULES[name], layers)
        assert [(held.at, held.end) for held in placed(found, layers)] == [(held.at, held.end) for held in given]


def test_tables_for_pages_and_for_terminals():
    assert markdown(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 | |"
    sheet = Sheet("what", ["", *("heading",) * 9], [["**one** `two` [three]", *map(str, range(101, 110))]])
    for width in (200, 60):
        console = Console(width=width, file=io.StringIO())
        console.print(sheet)
        shown = console.file.getvalue()
        assert all(str(number) in shown for number in range(101, 110))
        assert (shown.count("one two [three]") == 1) == (width == 200)  # again in front of the columns that follow below
        assert max(map(len, shown.splitlines())) <= width


# -- bench.gpu --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_gpu_script_in_its_small_form(tmp_path):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--lowering", "eager", "--only", "qwen", "--repeats", "1", "--tokens", "2",
                     "--out", str(path)]) == 0
    result, graphed = json.loads(path.read_text())
    assert result["check"]["holds"]
    assert (result["mode"], graphed["mode"]) == ("default", "reduce-overhead") and len(graphed["rows"]) == 2
    whole, merged = (row["flops"] for row in result["rows"])
    assert merged < whole


@pytest.mark.slow
def test_the_gpu_script_measures_one_by_one_what_was_compiled_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SMALL", tuple(dataclasses.replace(config, answers=False) for config in gpu.SMALL))
    path = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--lowering", "eager", "--only", "batch 1|answers", "--repeats", "1", "--tokens", "2",
                     "--together", "--largest-batch", "1", "--out", str(path)]) == 0
    *prefills, answers = sorted(json.loads(path.read_text()), key=lambda result: "answers" in result)
    assert len(prefills) == 4 and all(result["check"]["holds"] for result in prefills if result["mode"] == "default")
    assert all(result["others_were_done"] for result in prefills)
    assert [row["method"] for row in answers["rows"]] == ["inductor", "parvts"]


def test_what_fails_together_is_told_and_keeps_nobody_waiting(monkeypatch):
    class Failing(together.Task[int]):
        def prepare(self) -> int:
            raise RuntimeError("no weights")

    monkeypatch.setattr(together, "_turns", (threading.Barrier(1), threading.Lock()))
    assert "no weights" in together._run(Failing())


def test_the_gpu_scripts_check_finds_another_choice_of_tokens(tmp_path):
    model = SMALL[0].build(torch.device("cpu"), torch.float32)
    scene = SMALL[0].scene(model, 1)
    exact = gpu.run_reference(scene, KEPT, torch.float32)
    assert gpu.check(build(AT_DEFAULT_DEPTH["parvts"], scene, KEPT, backend=nothing), exact, None).holds
    assert not gpu.check(build(AT_DEFAULT_DEPTH["joint"], scene, KEPT, backend=nothing), exact, None).holds


def test_positions_on_a_grid_are_qwens_own():
    config = SMALL[1]
    model = config.build(torch.device("cpu"), torch.float32)
    scene = config.scene(model, 1)
    kinds = (scene.ids == model.config.image_token_id).int()
    expected, delta = model.model.get_rope_index(scene.ids, kinds, image_grid_thw=torch.tensor([[1, 12, 12]]))
    assert scene.positions.tolist() == expected.tolist()
    assert scene.next_position == scene.prompt + int(delta)


@pytest.mark.slow
def test_what_merging_costs(tmp_path: Path) -> None:
    """That the forms of a call agree is asserted in there."""
    out = tmp_path / "cost.json"
    found = merging_cost.main(["--layers", "4", "--width", "128", "--visual", "36", "--kept", "9", "--repeats", "1",
                               "--lowering", "eager", "--out", str(out)])
    assert json.loads(out.read_text())["settings"]["kept"] == 9
    whole, dropped, merged = (row["flops"] for row in found["prefills"])
    assert dropped < merged < whole
    assert [sheet.headings[1] for sheet in merging_cost.sheets(found)] == ["time", "causal, nothing counted"]


@pytest.mark.slow
def test_uneven_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uneven_batches, "EVEN", ((2, 3),) * 2)
    monkeypatch.setattr(uneven_batches, "UNEVEN", ((2, 2), (2, 4)))
    file = tmp_path / "uneven.json"
    found = uneven_batches.main(["--layers", "4", "--width", "128", "--text", "8", "--repeats", "1", "--lowering", "eager",
                                 "--keep-ratio", "0.5", "--out", str(file)])
    assert json.loads(file.read_text())["kept"] == [2, 4] == list(found["kept"])
    assert [(row["method"], row["batch"]) for row in found["rows"]] == [
        (method, batch) for method in ("inductor", "parvts") for batch in ("even", "uneven")]
    assert "times the even one" in figures.uneven_batches(found).title


@pytest.mark.slow
def test_picture_sizes(tmp_path: Path) -> None:
    """Each method in a process of its own; that every prompt is pruned is asserted in there."""
    file = tmp_path / "sizes.json"
    found = picture_sizes.main(["--layers", "4", "--width", "128", "--text", "8", "--sizes", "3", "--most", "10",
                                "--lowering", "eager", "--out", str(file)])
    assert json.loads(file.read_text())["settings"]["sizes"] == 3 == len(set(found["pictures"]))
    assert [(row["method"], len(row["first"]), len(row["again"])) for row in found["rows"]] == [
        ("inductor", 3, 3), ("parvts", 3, 3)]
    sheet = figures.picture_sizes(found)
    assert [row[0] for row in sheet.rows] == ["Inductor", "**parvts**"] and len(sheet.headings) == len(sheet.rows[0])
