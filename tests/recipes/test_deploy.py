"""``examples/deploy.py``: its package in a process without parvts_fx, and compile caches that are carried to another machine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import parvts_fx
from tests import llava
from tests.comparing import TOLERANCE
from tests.recipes import example
from tests.reference import relative_error
from tests.supported import ROOT

OPTIONS = {"keep_tokens": 3, "migration_depth": 1}
ARGUMENTS = ["--keep-tokens", "3", "--migration-depth", "1", "--batch", "2"]
PROMPTS = {"short": [[3, "image", 5], [1, "image", 4]], "long": [[9, "image", 30], [2, "image", 11]]}
"""By name; the second row of each is padded."""

PACKAGE = """
import sys
import torch
prefill = torch._inductor.aoti_load_package(sys.argv[1])
prompts = torch.load(sys.argv[2])
torch.save({name: prefill(*given) for name, given in prompts.items()}, sys.argv[3])
alone = [held[:1] for held in prompts["short"]]
try:
    prefill(*alone)
    raise SystemExit("a batch of another size was taken")
except RuntimeError as error:
    assert "expected: 2, but got: 1" in str(error), error
assert not {"parvts_fx", "transformers"} & sys.modules.keys()
"""
"""For a process of its own: package, prompts, and where results go."""

COMPILED = """
import json, sys, time
import torch, transformers
import parvts_fx
from torch._dynamo.utils import counters
folder, artifacts, out, task = sys.argv[1:]
model = transformers.AutoModelForImageTextToText.from_pretrained(folder + "/model").eval()
names = "input_ids", "attention_mask", "pixel_values"
prompt = dict(zip(names, torch.load(folder + "/prompts.pt")["short"]))
if task == "load":
    with open(artifacts, "rb") as file:
        assert torch.compiler.load_cache_artifacts(file.read()) is not None
parvts_fx.compile(model, strict=True, **json.load(open(folder + "/options.json")))
start = time.perf_counter()
with torch.no_grad():
    output = model(**prompt)
seconds = time.perf_counter() - start
assert parvts_fx.last_call(model).pruned
layers = output.past_key_values.layers
torch.save([output.logits, *(held for layer in layers for held in (layer.keys, layer.values))], out)
if task == "save":
    with open(artifacts, "wb") as file:
        file.write(torch.compiler.save_cache_artifacts()[0])
print(json.dumps({"seconds": seconds, "inductor": counters["inductor"], "aot": counters["aot_autograd"]}))
"""
"""For a process of its own: a first call by the compiled model, with caches that are saved behind it or loaded before."""


def run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts for it and options, in files."""
    folder, model = tmp_path_factory.mktemp("deploy"), llava.build(layers=2)
    model.save_pretrained(folder / "model")
    prompts = {name: llava.prompt(model, rows).inputs for name, rows in PROMPTS.items()}
    torch.save({name: [given["input_ids"], given["attention_mask"], given["pixel_values"]] for name, given in prompts.items()},
               folder / "prompts.pt")
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    return folder


@dataclasses.dataclass
class FirstCall:
    results: list[torch.Tensor]
    """Logits, and keys and values of each layer."""
    seconds: float
    inductor: dict[str, int]
    aot: dict[str, int]


def first_call(folder: Path, task: str) -> FirstCall:
    """By a process with cache folders of its own, which are empty: as on a machine of its own."""
    out, own = folder / f"{task}.pt", folder / f"files_to_{task}"
    own.mkdir()
    done = run("-c", COMPILED, folder, folder / "artifacts", out, task,
               TORCHINDUCTOR_CACHE_DIR=str(own / "cache"), TMPDIR=str(own))  # where Inductor keeps compiled headers
    assert done.returncode == 0, done.stderr[-4000:]
    return FirstCall(torch.load(out), **json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def cold(folder: Path) -> FirstCall:
    return first_call(folder, "save")


def assert_equal(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected) == 1 + 2 * 2
    for index, (ours, theirs) in enumerate(zip(actual, expected)):
        error = relative_error(ours, theirs)
        assert error <= TOLERANCE, f"result {index} is off by {error:.1e}"


@pytest.mark.supports("Lowerings", "AOTInductor: a package of the rewritten prefill, equal to the compiled one without parvts_fx")
@pytest.mark.inductor
@torch.no_grad()
def test_package_in_a_process_without_parvts(folder: Path, cold: FirstCall) -> None:
    package, out = folder / "prefill.pt2", folder / "packaged.pt"
    done = run("examples/deploy.py", folder / "model", "--out", package, *ARGUMENTS)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    assert "the rewritten graph equals the compiled model" in done.stdout and "the package equals" in done.stdout
    done = run("-c", PACKAGE, package, folder / "prompts.pt", out, AOTI_RUNTIME_CHECK_INPUTS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    packaged = torch.load(out)
    assert_equal(packaged["short"], cold.results)
    model = llava.build(layers=2)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    for name, rows in PROMPTS.items():
        prompt = llava.prompt(model, rows)
        output = model(**prompt.inputs)
        layers = output.past_key_values.layers
        assert parvts_fx.last_call(model).pruned and layers[0].keys.shape[2] < prompt.visual.shape[1]
        assert_equal(packaged[name], [output.logits, *(held for layer in layers for held in (layer.keys, layer.values))])


@pytest.mark.supports("Lowerings", "torch.compiler's cache artifacts, saved and loaded with other cache folders: all graphs hit")
@pytest.mark.inductor
def test_cache_artifacts_start_warm(folder: Path, cold: FirstCall) -> None:
    warm = first_call(folder, "load")
    print(f"first call: {cold.seconds:.1f} s, with the artifacts of another process {warm.seconds:.1f} s")
    graphs = cold.inductor["fxgraph_cache_miss"]
    assert graphs >= 1 and cold.aot["autograd_cache_saved"] == graphs and "fxgraph_cache_hit" not in cold.inductor
    assert warm.inductor["fxgraph_cache_hit"] == graphs and "fxgraph_cache_miss" not in warm.inductor
    assert warm.aot["autograd_cache_hit"] == graphs and "autograd_cache_miss" not in warm.aot
    assert_equal(warm.results, cold.results)


@pytest.mark.parametrize("arguments, says", [
    (["MODEL/none"], "is no folder of a model"),
    (["MODEL", "--out", "prefill.zip"], "ends in .pt2"),
    (["MODEL", "--batch", "0"], "at least one prompt"),
    (["MODEL", "--keep-tokens", "0"], "keep_tokens"),
    (["MODEL", "--keep-tokens", "99", "--migration-depth", "1"], "nothing is pruned: all visual tokens are kept"),
], ids=["no model", "no package", "no prompt", "no token", "all tokens"])
def test_bad_input(
    folder: Path, tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and nothing written."""
    main = example("deploy")["main"]
    monkeypatch.setattr(sys, "argv", ["deploy.py", *(held.replace("MODEL", str(folder / "model")) for held in arguments)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert isinstance(stopped.value.code, str) and says in stopped.value.code and "\n" not in stopped.value.code
    assert not list(tmp_path.iterdir())
