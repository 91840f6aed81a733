"""One of several processes over which models are spread, by tensor parallelism or by FSDP, or in which each has a copy.

``torchrun ... -m tests.in_processes FOLDER``.

FOLDER holds a saved model for each name in its ``models.json``. Writes what came of each into ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parvts_fx
from tests import llava
from tests.models.builders import BUILDERS

OPTIONS = dict(lowering="eager", keep_tokens=3, migration_depth=1, strict=True)
NEW = 6


def quarrelsome(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Ranks tokens from front to back in the first process, and from back to front in all others."""
    order = torch.arange(hidden.shape[1], dtype=torch.float32).expand(hidden.shape[:2])
    return order if dist.is_initialized() and dist.get_rank() else -order


def run(name: str, folder: Path | None, **options: Any) -> dict[str, Any]:
    """Greedy tokens, the rows that are left and all of their logits, of a model as it is built or as it is loaded into all
    processes."""
    torch._dynamo.reset()
    built = BUILDERS[name]()
    model = built.model
    if folder is not None:
        model = type(model).from_pretrained(folder / name, tp_plan="auto", dtype=torch.float32).eval()
        model.generation_config = built.model.generation_config
    parvts_fx.compile(model, **{**OPTIONS, **options})
    tokens = model.generate(**built.inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    with torch.no_grad():
        logits = model(**built.inputs).logits
    record = parvts_fx.last_call(model)
    spread = sum(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    return {"tokens": tokens.tolist(), "kept": record.kept.nonzero().tolist(), "pruned": record.pruned, "spread": spread,
            "logits": logits.tolist()}


def run_sharded(by_layer: bool) -> dict[str, Any]:
    """The same of a LLaVA whose parameters FSDP keeps in parts, gathered for the whole model or for each layer."""
    torch._dynamo.reset()
    model = llava.build()
    prompt = llava.prompt(model, [[3, "image", 6]])
    with torch.no_grad():
        plain = model(**prompt.inputs).logits
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in llava.text_model(model).layers if by_layer else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", parvts_fx.ParvtsWarning)
        parvts_fx.compile(model, **{**OPTIONS, "strict": not by_layer})
        with torch.no_grad():
            logits = model(**prompt.inputs).logits
    record = parvts_fx.last_call(model)
    told = [str(one.message) for one in caught if issubclass(one.category, parvts_fx.ParvtsWarning)]
    return {"pruned": record.pruned, "reason": record.reason, "told": told, "logits": logits.tolist(), "plain": plain.tolist()}


def run_replicated(outer: bool) -> dict[str, Any]:
    """The same of one that each process has whole (DistributedDataParallel), compiled in its wrapper or inside of it."""
    torch._dynamo.reset()
    model = llava.build().requires_grad_(True)
    prompt = llava.prompt(model, [[3, "image", 6]])
    compiled = wrapper = torch.nn.parallel.DistributedDataParallel(model)
    if not outer:
        compiled = model
    parvts_fx.compile(compiled, **OPTIONS)
    with torch.no_grad():
        logits = wrapper(**prompt.inputs).logits
    record = parvts_fx.last_call(compiled)
    return {"pruned": record.pruned, "reason": record.reason, "logits": logits.tolist()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    names = json.loads((folder / "models.json").read_text())
    found = {name: run(name, folder) for name in names}
    found["quarrelsome"] = run(names[0], folder, score=quarrelsome)
    found["sharded"] = [run_sharded(by_layer) for by_layer in (False, True)]
    found["replicated"] = [run_replicated(outer) for outer in (False, True)]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
