"""FLOPs of real configurations, without weights: ``python -m bench.flops``.

The decoder's prefill of LLaVA-1.5-7B and 13B, LLaVA-NeXT-7B and Qwen2.5-VL-7B is captured on fake tensors, rewritten,
and counted by torch's FlopCounterMode on the rewritten graph. Beside it stands a closed formula. Results go into
``bench/results/flops.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.progress import track
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from bench import figures
from parvts_fx.capture import capture
from parvts_fx.cost import count_flops
from parvts_fx.options import Options, parse_options
from parvts_fx.rewriting import Rewriting, rewrite_graph

RESULTS = Path(__file__).parent / "results" / "flops.json"
KEPT, DEPTH, IMAGE = (192, 128, 64), 3, 7


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A decoder's sizes as published, and a prompt."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    vocabulary: int
    text: int
    visual: int
    build: Callable[[Configuration, torch.dtype], torch.nn.Module]

    def formula(self, rows: Sequence[tuple[int, int, int]], logits: int) -> float:
        """Floating-point operations from (rows that ask, rows with keys, pairs) per layer and rows with logits.

        A matrix product of [m, k] with [k, n] counts 2 m k n; attention counts two of [rows, keys] by head size.
        """
        head = self.hidden // self.heads
        total = 2.0 * self.hidden * self.vocabulary * logits
        for asking, keyed, pairs in rows:
            per_query = 2 * self.hidden * self.hidden * 2 + 3 * 2 * self.hidden * self.mlp
            total += asking * per_query + keyed * 2 * 2 * self.hidden * self.key_heads * head + 4 * pairs * self.hidden
        return total


def rows_of(config: Configuration, kept: int, depth: int) -> list[tuple[int, int, int]]:
    """Attention fusion with dead rows left out.

    The last migration layer asks for the kept rows alone, and the model's last layer for the prompt's last row alone.
    """
    text, other = config.text, config.visual - kept
    full, short = text + config.visual, text + kept
    parallel = short * short + (text + other) ** 2 + text * full
    last = short * short + text * full
    rows = [(full, full, parallel)] * (depth - 1) + [(short, full, last)]
    return rows + [(short, short, short * short)] * (config.layers - depth - 1) + [(1, short, short)]


def llava(config: Configuration, dtype: torch.dtype) -> torch.nn.Module:
    given = hf.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=1,
                           num_attention_heads=16, image_size=14 * int(config.visual**0.5), patch_size=14),
        text_config=dict(model_type="llama", hidden_size=config.hidden, intermediate_size=config.mlp,
                         num_hidden_layers=config.layers, num_attention_heads=config.heads,
                         num_key_value_heads=config.key_heads, vocab_size=config.vocabulary),
        image_token_index=IMAGE, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration._from_config(given, dtype=dtype)


def qwen(config: Configuration, dtype: torch.dtype) -> torch.nn.Module:
    given = hf.Qwen2_5_VLConfig(
        text_config=dict(hidden_size=config.hidden, intermediate_size=config.mlp, num_hidden_layers=config.layers,
                         num_attention_heads=config.heads, num_key_value_heads=config.key_heads,
                         vocab_size=config.vocabulary,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
        vision_config=dict(depth=1, hidden_size=1280, out_hidden_size=config.hidden), image_token_id=IMAGE)
    return hf.Qwen2_5_VLForConditionalGeneration._from_config(given, dtype=dtype)


CONFIGURATIONS = (
    Configuration("LLaVA-1.5-7B", 4096, 32, 32, 32, 11008, 32064, 64, 576, llava),
    Configuration("LLaVA-1.5-13B", 5120, 40, 40, 40, 13824, 32064, 64, 576, llava),
    Configuration("LLaVA-NeXT-7B", 4096, 32, 32, 32, 11008, 32064, 64, 2916, llava),
    Configuration("Qwen2.5-VL-7B", 3584, 28, 28, 4, 18944, 152064, 64, 1280, qwen),
)


class _Captured(Exception):
    """The prefill's graph has been seen; nothing needs to run."""


def capture_prefill(
    config: Configuration, batch: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[GraphModule, list[object]]:
    """The graph of merge and decoder, as generate's prefill has it: the features are given."""
    ids = torch.full((batch, config.text + config.visual), 9)
    ids[:, 35:35 + config.visual] = IMAGE
    with FakeTensorMode() as mode:
        model = config.build(config, dtype).eval().requires_grad_(False)
        embeddings = torch.empty(batch, ids.shape[1], config.hidden, dtype=dtype)
        features = torch.empty(batch * config.visual, config.hidden, dtype=dtype)
        positions = torch.arange(ids.shape[1])[None].expand(batch, -1)
        mask = torch.empty(batch, ids.shape[1], 1, dtype=torch.bool)
    text = model.model.language_model
    seen: list[Any] = []

    def prefill(embeddings: torch.Tensor, mask: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> Any:
        merged = embeddings.masked_scatter(mask, features)
        out = text(inputs_embeds=merged, position_ids=positions, use_cache=True)
        return model.lm_head(out.last_hidden_state[:, -1:]), out.past_key_values

    def keep(module: GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
        seen.extend([capture(module, example_inputs), list(example_inputs)])
        raise _Captured

    torch._dynamo.reset()
    with torch.no_grad(), mode:
        try:
            torch.compile(prefill, backend=keep, dynamic=False)(embeddings, mask, features, positions)
        except Exception:
            if not seen:
                raise
    return seen[0], seen[1]


def rewrite(graph: GraphModule, inputs: list[object], options: Options) -> tuple[Rewriting, float]:
    """The rewriting, and the seconds that analysis, passes and cheap verification took."""
    start = time.perf_counter()
    with torch.no_grad():
        done = rewrite_graph(graph, inputs, options)
    return done, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.flops", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="LLaVA-1.5-7B alone")
    given = parser.parse_args()
    console = Console()
    results = []
    for config in track(CONFIGURATIONS[:1] if given.short else CONFIGURATIONS, "configurations", console=console):
        graph, inputs = capture_prefill(config)
        before = count_flops(graph)
        full = config.text + config.visual
        expected_before = config.formula([(full, full, full * full)] * config.layers, 1)
        for kept in KEPT:
            done, seconds = rewrite(graph, inputs, parse_options(dict(keep_tokens=kept, migration_depth=DEPTH)))
            after = count_flops(done.module)
            scoring = 2 * full * full * config.hidden  # the default rule compares all tokens with one another
            expected = config.formula(rows_of(config, kept, DEPTH), 1) + scoring
            results.append({
                "model": config.name, "layers": config.layers, "text": config.text, "visual": config.visual, "kept": kept,
                "depth": DEPTH, "flops_before": before, "flops_after": after, "formula_before": expected_before,
                "formula_after": expected, "rewriting_seconds": round(seconds, 3),
            })
    console.print(figures.flops({"results": results}))
    apart = max(abs(row[f"flops_{side}"] / row[f"formula_{side}"] - 1) for row in results for side in ("before", "after"))
    console.print(f"At most {apart:.2%} from the closed formula")
    RESULTS.parent.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__.split("+")[0], "transformers": hf.__version__}
    if not given.short:
        RESULTS.write_text(json.dumps(versions | {"results": results}, indent=1) + "\n")
    if apart > 0.005:
        raise SystemExit("FLOPs differ from the closed formula by more than 0.5 %")


if __name__ == "__main__":
    main()
