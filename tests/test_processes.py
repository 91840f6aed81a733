"""Models that are spread over two processes by tensor parallelism: as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.in_processes import quarrelsome, run
from tests.models.builders import BUILDERS
from tests.models.installed import BROKEN, skip_broken
from tests.supported import ROOT

NAMES = ["llava", "qwen2_vl", "llama4"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
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


@pytest.mark.supports("Processes", "tensor parallelism over two: pruned in each, the same rows, tokens as in one process")
@pytest.mark.parametrize("name", NAMES)
def test_as_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    skip_broken(name)
    alone = run(name, None)
    assert alone["pruned"] and not alone["spread"]
    for found in ranks:
        assert found[name]["spread"] > 5 and found[name]["pruned"]
        assert (found[name]["tokens"], found[name]["kept"]) == (alone["tokens"], alone["kept"])


def test_all_choose_as_the_first(ranks: list[dict[str, Any]]) -> None:
    """Where processes come to other scores, those of the first hold in all."""
    alone = run(NAMES[0], None, score=quarrelsome)
    for found in ranks:
        assert found["quarrelsome"]["tokens"] == alone["tokens"] and found["quarrelsome"]["kept"] == alone["kept"]
