"""What of torch parvts_fx leans on although torch does not promise it: in one file, and nothing breaks by importing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parvts_fx import torch_private
from parvts_fx.torch_private import TorchMoved, as_newer_torch, inductor_settings

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = re.compile(r"torch\._check\w*")
"""Documented in spite of its name."""


def sources() -> Iterator[Path]:
    for folder in ("parvts_fx", "passes", "backends"):
        yield from (path for path in (ROOT / folder).rglob("*.py") if path.name != "torch_private.py")


def private_names(text: str) -> Iterator[str]:
    """Torch's private modules and names, and private attributes of anything that is not ``self``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
            if parts[0] == "torch" and (private or "experimental" in parts or "weak" in parts) and not PUBLIC.fullmatch(name):
                yield name
            elif name.endswith(("._cdata", "._schema", "._codegen", "._call_impl", "._compiled_call_impl")):
                yield name


def test_private_names_stand_in_one_file():
    found = {path.relative_to(ROOT).as_posix(): sorted(set(private_names(path.read_text()))) for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


def test_private_names_are_recognised():
    text = """
        import torch._dynamo
        from torch.utils._pytree import tree_leaves
        from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
        x = tensor.untyped_storage()._cdata
        y = torch._C._functorch
        torch._check(x); self._own; torch.ops.aten.add.default
    """
    assert sorted(private_names(textwrap.dedent(text))) == [
        "tensor.untyped_storage()._cdata", "torch._C", "torch._C._functorch", "torch._dynamo",
        "torch.overrides._pop_mode_temporarily", "torch.utils._pytree.tree_leaves"]


def modules() -> list[str]:
    """The private modules that names are looked up in."""
    text = Path(torch_private.__file__).read_text()
    return sorted(set(re.findall(r'_(?:find|get)\(\s*"(torch[\w.]+)"', text)))


@pytest.mark.slow
def test_importing_works_whatever_is_gone():
    """Each module made unimportable for us, in a process that is forked from one that has torch."""
    code = f"""
        import importlib, os, sys, torch, torch._dynamo, torch._inductor, torch.utils.flop_counter, torch.nn.attention
        names, found = {modules()!r}, importlib.import_module
        for name in names:
            found(name)
        for name in names:
            pid = os.fork()
            if pid == 0:
                def import_module(wanted, package=None):
                    if wanted == name:
                        raise ModuleNotFoundError(wanted)
                    return found(wanted, package)

                importlib.import_module = import_module  # for us alone: torch goes on to find what is its own
                try:
                    import parvts_fx
                    parvts_fx.Options()
                    os._exit(0)
                except BaseException as error:
                    print(name, repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0, name
        print(len(names))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout == f"{len(modules())}\n" and len(modules()) >= 10, done.stderr


def test_a_name_that_is_gone_says_so_when_it_is_used():
    gone = torch_private._find("torch._subclasses.fake_tensor", "NoSuchName")
    told = rf"needs torch\._subclasses\.fake_tensor\.NoSuchName, which torch {re.escape(torch.__version__)} does not have"
    for use in (lambda: gone(), lambda: isinstance(1, gone), lambda: gone.attribute):
        with pytest.raises(TorchMoved, match=told):
            use()
    with pytest.raises(TorchMoved, match=r"torch\.no_such_module\.name"):
        torch_private._get("torch.no_such_module", "name")
    assert torch_private._find("torch.no_such_module", "name", len) is len


@pytest.mark.slow
def test_a_prefill_without_a_private_name_runs_as_it_came():
    """A name is gone without which nothing is rewritten: told with torch's version, and the model's own result comes out."""
    code = """
        import importlib, warnings, torch, torch._dynamo
        import tests.plain as plain
        from tests.plain import Plain, prompt
        model = Plain(plain.Specification(layers=2)); given = prompt(model.spec).arguments
        with torch.no_grad():
            wanted = model(*given)[0]
            real = importlib.import_module
            importlib.import_module = lambda name, *rest: real(name.replace("_dispatch.python", "gone"), *rest)
            import parvts_fx
            importlib.import_module = real
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = torch.compile(model, backend="parvts", options={"lowering": "eager", "migration_depth": 1})(*given)[0]
        assert torch.equal(found, wanted), (found.shape, wanted.shape)
        print([text for text in (str(warning.message) for warning in told) if "enable_python_dispatcher" in text])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "needs torch._dispatch.python.enable_python_dispatcher" in done.stdout, done.stdout + done.stderr


def test_inductor_settings_are_known():
    assert "max_autotune" in inductor_settings()


def test_newer_torch_needs_nothing():
    with as_newer_torch():
        assert not torch.compiler.is_exporting()
