"""Models that are spread over two processes, by tensor parallelism or by FSDP: as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.in_processes import OPTIONS, quarrelsome, run
from tests.models.builders import BUILDERS
from tests.models.installed import BROKEN, skip_broken
from tests.reference import relative_error
from tests.supported import ROOT

NAMES = ["llava", "qwen2_vl", "llama4"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("spread")
    names = [name for name in NAMES if (name, transformers.__version__) not in BROKEN]
    for name in names:
        BUILDERS[name]().model.save_pretrained(folder / name)
    (folder / "models.json").write_text(json.dumps(names))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.in_processes",
         str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(Path(folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.supports("Processes", "tensor parallelism over two: pruned in each, the same rows, tokens as in one process")
@pytest.mark.parametrize("name", NAMES)
def test_as_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    skip_broken(name)
    alone = run(name, None)
    assert alone["pruned"] and not alone["spread"]
    for found in ranks:
        assert found[name]["spread"] > 5 and found[name]["pruned"]
        assert (found[name]["tokens"], found[name]["kept"]) == (alone["tokens"], alone["kept"])
        assert relative_error(torch.tensor(found[name]["logits"]), torch.tensor(alone["logits"])) < TOLERANCE


@pytest.mark.slow
def test_all_choose_as_the_first(ranks: list[dict[str, Any]]) -> None:
    """Where processes come to other scores, those of the first hold in all."""
    alone = run(NAMES[0], None, score=quarrelsome)
    for found in ranks:
        assert found["quarrelsome"]["tokens"] == alone["tokens"] and found["quarrelsome"]["kept"] == alone["kept"]


def wanted_of_one_picture() -> Any:
    model = llava.build()
    prompt = llava.prompt(model, [[3, "image", 6]])
    (wanted,) = expected(model, prompt, keep_tokens=OPTIONS["keep_tokens"], migration_depth=OPTIONS["migration_depth"])
    return wanted.logits


@pytest.mark.slow
@pytest.mark.supports("Processes", "FSDP2 around the whole model: pruned in each")
def test_sharded_as_a_whole(ranks: list[dict[str, Any]]) -> None:
    wanted = wanted_of_one_picture()
    for found in ranks:
        whole, _ = found["sharded"]
        assert whole["pruned"] and not whole["told"]
        assert relative_error(torch.tensor(whole["logits"][0]), wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.supports("Processes", "DistributedDataParallel, with the wrapper compiled or the model in it: pruned in each")
def test_replicated(ranks: list[dict[str, Any]]) -> None:
    wanted = wanted_of_one_picture()
    for replicated in (held for found in ranks for held in found["replicated"]):
        assert replicated["pruned"], replicated["reason"]
        assert relative_error(torch.tensor(replicated["logits"][0]), wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "FSDP2 around each layer, whose hooks break the graph, with their name")
def test_sharded_by_layer(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        _, layered = found["sharded"]
        reason, = layered["told"]
        assert not layered["pruned"] and reason.endswith(layered["reason"]) and "torch.distributed.fsdp" in reason
        assert "parvts_fx.compile(model)" not in reason  # that is how it was called
        assert relative_error(torch.tensor(layered["logits"]), torch.tensor(layered["plain"])) < TOLERANCE
