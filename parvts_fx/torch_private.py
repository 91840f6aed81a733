"""Everything of torch that parvts_fx leans on and torch does not promise to keep, with what breaks when it moves.

Names that the installed torch lacks stand as objects that raise :class:`TorchMoved` when they are used, so that importing
parvts_fx never fails for them: the rewriting of a prefill fails instead, which then runs as it came. Where something else
does as well, it takes the name's place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import re
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode


class TorchMoved(ImportError):
    """The installed torch has no such private name; the message says which version it is, and which name."""


def _get(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TorchMoved(f"parvts_fx needs {module}.{name}, which torch {torch.__version__} does not have. "
                         "Use a version that parvts_fx is tested with (constraints.txt), or report this.") from error


class _Absent(type):
    """A class in place of a name that is gone: whatever is done with it raises."""

    def _fail(cls, *_: Any, **__: Any) -> Any:
        raise TorchMoved(*cls.reason)

    __call__ = __instancecheck__ = __subclasscheck__ = _fail

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._fail()


def _find(module: str, name: str, instead: Any = None) -> Any:
    """The name, or else what stands in for it, or else what raises when it is used."""
    try:
        return _get(module, name)
    except TorchMoved as error:
        return _Absent(name, (), {"reason": error.args}) if instead is None else instead


# -- fake tensors, symbolic sizes and tracing: without them nothing is rewritten ----------------------------------------------

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
else:
    FakeTensor = _find("torch._subclasses.fake_tensor", "FakeTensor")
    FakeTensorMode = _find("torch._subclasses.fake_tensor", "FakeTensorMode")

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
"""The logger that fake tensors complain to. Under another name, trials that fail are logged: noise, and nothing worse."""

make_fx = _find("torch.fx.experimental.proxy_tensor", "make_fx")
"""Traces the partition, scoring rules and masks into the graph."""

enable_python_dispatcher = _find("torch._dispatch.python", "enable_python_dispatcher")
"""Lets operations take symbolic sizes outside of Dynamo. Torch's own tracing uses it alike."""

free_unbacked_symbols = _find("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols")
"""Sizes that depend on data; the cache of evaluations must not let two results share one."""



def settle_sizes(mode: Any) -> None:
    """Sizes that depend on data have been found in what was just evaluated; torch.fx's tracers ask for each where it arises."""
    pending = getattr(getattr(mode, "shape_env", None), "pending_fresh_unbacked_symbols", None)
    if pending:
        pending.clear()


OpOverload = _find("torch._ops", "OpOverload")
OpOverloadPacket = _find("torch._ops", "OpOverloadPacket")
HigherOrderOperator = _find("torch._ops", "HigherOrderOperator")
"""The kinds of operations in a graph, to tell which write into their arguments."""

is_functorch_wrapped_tensor = _find("torch._C._functorch", "is_functorch_wrapped_tensor")
"""Whether a tensor is inside vmap, where it has no memory of its own. Masks of transformers are made there."""

is_traceable_wrapper_subclass = _find("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")
"""Whether a tensor is made of others (quantised weights)."""

disable_current_modes = _find("torch.utils._python_dispatch", "_disable_current_modes")
"""Leaves Dynamo's fake mode, to run operations on small real tensors and to time kernels."""

tree_leaves = _find("torch.utils._pytree", "tree_leaves")
"""The tensors in nested arguments and outputs. Without it a call of ``parvts_fx.compile``'s model raises."""


if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    TorchDispatchMode = _find("torch.utils._python_dispatch", "TorchDispatchMode", object)
    """Without it, models that are spread over processes talk to each other in proofs."""


def process_group(name: str) -> Any:
    """The group of processes that collective operations name so."""
    return _get("torch.distributed.distributed_c10d", "_resolve_process_group")(name)


def of_first_process(call: Callable[..., Any], held: Any, group: Any) -> Any:
    """What the first process of a group holds, as collective operations of graphs do it; ``call`` runs or writes an operation."""
    told = call(torch.ops._c10d_functional.broadcast.default, held, 0, group)
    return call(torch.ops._c10d_functional.wait_tensor.default, told)


def operation_name(overload: Any) -> str:
    """With its namespace: "aten::add"."""
    return overload._schema.name


def named_arguments(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an operation was given, by the names of its schema."""
    return {**dict(zip([argument.name for argument in overload._schema.arguments], args)), **kwargs}


def memory_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake ones too. No public name tells: fake memory has no address."""
    return tensor.untyped_storage()._cdata


def writes_into_arguments(overload: Any) -> bool:
    """Whether an operation's schema says that it changes what it is given."""
    return overload._schema.is_mutable


def expression(size: torch.SymInt | torch.SymFloat) -> sympy.Expr:
    """A symbolic size as a formula of symbols: how the analysis tells the prompt's length from other sizes."""
    return size.node.expr


def traced_number(size: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """What a symbolic size was when it was traced; None where it depends on data."""
    node = size.node
    return int(node.maybe_as_int()) if node.is_constant() else node.hint


def traced_numbers(size: torch.SymInt | torch.SymFloat) -> Mapping[sympy.Symbol, Any]:
    """The same for the symbols that it is made of. (The field has had another name in older versions.)"""
    return size.node.shape_env.backed_var_to_val


def assumed(mode: Any, since: int = 0) -> list[sympy.Basic]:
    """What has been taken for granted of sizes, in the order in which it was. While Dynamo captures, it guards all of that; of
    what is written later somebody else has to make sure.

    Args:
        mode: the fake tensors' mode.
        since: how much is known already.
    """
    return [guard.expr for guard in getattr(mode.shape_env, "guards", ())[since:]]


def may_be_negative(size: torch.SymInt) -> bool:
    """Whether a number was any other than a size when it came in; taken for granted where torch does not tell."""
    bound = getattr(size.node.shape_env, "bound_sympy", None)
    return bound is None or bool(bound(size.node.expr).lower < 0)


def is_symbol(size: int | torch.SymInt) -> bool:
    """Whether a size has a name, and is no formula of others."""
    return isinstance(size, torch.SymInt) and expression(size).is_Symbol


class NamedSizes:
    """Symbols of their own for sizes that are formulas, while a graph is lowered.

    Afterwards the formulas take the symbols' places in all that has been assumed meanwhile, so that it is guarded like
    everything else. Without the private names no size gets one: graphs of any size compile, and take longer.
    """

    def __init__(self) -> None:
        self._formulas: dict[sympy.Symbol, sympy.Expr] = {}
        self._replaced: dict[sympy.Symbol, sympy.Expr] = {}
        self._environment: Any = None

    def add(self, size: torch.SymInt) -> torch.SymInt | None:
        """A name for a size; None where it cannot have one: it stands for at least 2, as those of tensors' sizes do."""
        environment, hint = size.node.shape_env, traced_number(size)
        try:
            source = _get("torch._dynamo.source", "ConstantSource")(f"parvts_fx_size_{len(self._formulas)}")
            dynamic = _get("torch.fx.experimental.symbolic_shapes", "DimDynamic").DYNAMIC
            if hint is None or hint < 2 or not size >= 2:
                return None
            symbol = environment.create_symbol(hint, source, dynamic)
            named = environment.create_symintnode(symbol, hint=hint, source=source)
        except (TorchMoved, AttributeError, TypeError):
            return None
        self._environment = environment
        self._formulas[symbol] = expression(size)
        return named

    def replace(self, size: torch.SymInt, total: torch.SymInt) -> None:
        """Have a sum of names in the place of a symbol, in what :meth:`renamed` gives."""
        self._replaced[expression(size)] = expression(total)

    def renamed(self, held: Any) -> Any:
        """An example input of such a size: a size or a fake tensor. Others come as they are."""
        if isinstance(held, torch.SymInt):
            return self._size(held)
        sizes = (*held.shape, *held.stride()) if isinstance(held, FakeTensor) else ()
        renamed = [self._size(size) for size in sizes]
        if all(new is size for new, size in zip(renamed, sizes)):
            return held
        with held.fake_mode:
            return torch.empty_strided(
                renamed[:held.dim()], renamed[held.dim():], dtype=held.dtype, device=held.device)

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(size, int) or not expression(size).free_symbols & self._replaced.keys():
            return size
        return self._environment.create_symintnode(
            expression(size).xreplace(self._replaced), hint=traced_number(size), source=None)

    def forget(self) -> None:
        """Put the formulas into the symbols' places."""
        environment, formulas = self._environment, self._formulas
        if not formulas:
            return
        for symbol, found in list(environment.replacements.items()):
            if symbol in formulas or found.free_symbols & formulas.keys():
                del environment.replacements[symbol]
                again = sympy.expand(found.xreplace(formulas))
                if symbol not in formulas and symbol not in again.free_symbols:  # else it says that it is what it is
                    environment.replacements[symbol] = again
        assumed: list[Any] = []
        others: list[Any] = []
        for guard in environment.guards:
            (assumed if guard.expr.free_symbols & formulas.keys() else others).append(guard)
        environment.guards[:] = others
        environment._update_version_counter()
        for guard in assumed:
            environment.evaluate_expr(guard.expr.xreplace(formulas))


WeakReference: Callable[..., Any] = _find("torch.utils.weak", "WeakIdRef", weakref.ref)
"""A weak reference that knows that a tensor's Python object may come back to life. Python's own does for what we look up."""


# -- operations by other names of theirs: where one is gone, no graph has it ---------------------------------------------------

native_pad = _find("torch._C._nn", "pad", F.pad)
native_linear = _find("torch._C._nn", "linear", F.linear)


def _overload(namespace: Any, name: str, instead: Any) -> Any:
    return getattr(getattr(namespace, name, None), "default", instead)


aten_softmax = _overload(torch.ops.aten, "_softmax", torch.softmax)
unsafe_view = _overload(torch.ops.aten, "_unsafe_view", torch.ops.aten.view.default)
encoder_layer = _find("torch", "_transformer_encoder_layer_fwd")
"""A whole ``nn.TransformerEncoderLayer``: what it calls where no gradients are recorded."""

assert_scalar = _overload(torch.ops.aten, "_assert_scalar", torch._check)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """oneDNN's matrix product, what Inductor itself calls. Without it ``linear_kernels="auto"`` fails; "library" does not."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], None)


class OperationCounter(FlopCounterMode):
    """Torch's counter of FLOPs, which tells of every operation that it lets run: its name, what it was given, its result, and
    its FLOPs (None where it does not count them). Where the method is gone, FLOPs are counted and nothing is told."""

    def __init__(self, tell: Callable[[str, Any, Any, int | None], None]):
        super().__init__(display=False)
        self._tell, self._known = tell, 0

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        super()._count_flops(func_packet, out, args, kwargs)
        counts = func_packet in self.flop_registry
        total = self.get_total_flops() if counts else self._known
        self._tell(str(func_packet), (args, kwargs), out, total - self._known if counts else None)
        self._known = total
        return out


# -- graphs and modules ----------------------------------------------------------------------------------------------------------

def takes_and_returns_as(graph: Graph, other: Graph) -> None:
    """Let a graph take and return what the other does. Dynamo's return lists, which nothing else tells."""
    graph._codegen = other._codegen


def graph_module_like(module: GraphModule, graph: Graph) -> GraphModule:
    """A module around a graph, which takes and returns what ``module`` does.

    Its Python source is written when somebody runs or reads it; at once where torch has no lazy modules: slower.
    """
    takes_and_returns_as(graph, module.graph)
    try:
        lazily, make = (_get("torch.fx._lazy_graph_module", name) for name in ("_use_lazy_graph_module", "_make_graph_module"))
    except TorchMoved:
        return GraphModule(module, graph)
    with lazily(True):
        return make(module, graph)


def keep_sources(module: GraphModule, copy: GraphModule, mapping: Mapping[Node, Node]) -> None:
    """Let a copy of a graph of Dynamo's tell as well where its inputs come from.

    Without it the compiler behind takes weights for inputs that may lie elsewhere at the next call: with CUDA graphs all of them
    are copied at each call, and held twice.
    """
    if hasattr(module, "_param_name_to_source"):
        copy._param_name_to_source = module._param_name_to_source
        for node, twin in mapping.items():
            if hasattr(node, "_dynamo_source"):
                twin._dynamo_source = node._dynamo_source


def name_sources(module: GraphModule) -> None:
    """Say of inputs that a rewriting has added to a graph of Dynamo's that they come from nowhere: all must say something."""
    if hasattr(module, "_param_name_to_source"):
        for node in module.graph.find_nodes(op="placeholder"):
            if not hasattr(node, "_dynamo_source"):
                node._dynamo_source = None


def uncompiled_call(module: torch.nn.Module) -> Callable[..., Any]:
    """What a module does when it is called, whatever it has been compiled with; :func:`parvts_fx.explain` compiles it."""
    return module._call_impl


def surround_compiled_call(module: torch.nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put something around what ``module.compile()`` has made. If the field moves, the model stays compiled, but without
    what :func:`parvts_fx.compile` does beside: said at once, when it is compiled."""
    call = getattr(module, "_compiled_call_impl", None)
    if call is None:
        raise TorchMoved(f"parvts_fx needs Module._compiled_call_impl, which torch {torch.__version__} does not have. "
                         'torch.compile(model, backend="parvts") does without it.')
    module._compiled_call_impl = around(call)


def hook_tables(module: torch.nn.Module) -> list[dict[int, Any]]:
    """A module's hooks around its forward. Without a table, no module has such hooks."""
    return [vars(module)[name] for name in ("_forward_hooks", "_forward_pre_hooks") if name in vars(module)]


def weight_tables(module: torch.nn.Module) -> list[dict[str, torch.Tensor | None]]:
    """A module's own parameters and buffers, by name."""
    return [vars(module)["_parameters"], vars(module)["_buffers"]]


def changes_of(tensor: torch.Tensor) -> int:
    """How often a tensor has been written into."""
    return tensor._version


# -- what Dynamo raises, and how it captures: parvts_fx.compile's part -----------------------------------------------------------

class _NeverRaised(Exception):
    """In place of an error that is gone: then settings are not weakened for a frame that they do not suit."""


TorchDynamoException: type[Exception] = _find("torch._dynamo.exc", "TorchDynamoException", _NeverRaised)
BackendCompilerFailed: type[Exception] = _find("torch._dynamo.exc", "BackendCompilerFailed", _NeverRaised)
if not TYPE_CHECKING:
    GuardOnDataDependentSymNode = _find(
        "torch.fx.experimental.symbolic_shapes", "GuardOnDataDependentSymNode", _NeverRaised)


def dynamo_config() -> Any:
    """Dynamo's settings: which data-dependent operations stay in the graph, and how often code is compiled again."""
    return _get("torch._dynamo", "config")


def messages_while_capturing() -> set[Callable[..., Any]]:
    """Methods of loggers that Dynamo is to leave out of what it captures, as torch.export does: each would break the graph."""
    names = [name for name in dir(logging.Logger) if name.startswith(("debug", "info", "warning"))]
    return {getattr(logging.Logger, name) for name in names} | set(dynamo_config().ignore_logging_functions)


OF_TORCH = "code of torch's own"


@dataclasses.dataclass(frozen=True)
class GraphBreak:
    """What made Dynamo end a graph."""

    what: str
    where: str


def frames_of_breaks(start: int) -> list[list[tuple[str, int, str]]]:
    """The functions in which Dynamo ended each graph, without the first ones, inside out: file, line, name."""
    return [[(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(held.user_stack)]
            for held in _graph_breaks[start:]]


_EXCLUDED = re.compile(r"Skip calling function `<function (\S+)")


_graph_breaks: Sequence[Any] = _find("torch._dynamo.utils", "graph_break_reasons", ())
"""Dynamo's list of them. Without it, there are none."""


def count_graph_breaks() -> int:
    """Of the whole process so far; asked in every call."""
    return len(_graph_breaks)


def graph_breaks(start: int) -> Sequence[GraphBreak]:
    """Of the whole process, in order, without the first ones."""
    found = []
    for held in _graph_breaks[start:]:
        excluded, what = _EXCLUDED.search(held.reason), held.reason.partition("\n")[0]
        found.append(GraphBreak(
            f"{excluded[1]} is excluded by torch.compiler.disable" if excluded else what[:1].lower() + what[1:],
            _place(list(reversed(held.user_stack)))))
    return found


def _place(frames: Sequence[Any]) -> str:
    """The innermost function that is not torch's; what it calls of torch.distributed (FSDP's hooks, say) is named with it.

    Args:
        frames: inside out.
    """
    place = next((frame for frame in frames if _package_of(frame.filename) is None), None)
    package = _package_of(frames[0].filename) if frames else None
    ours = OF_TORCH if place is None else f"{place.name} of {Path(place.filename).name}"
    return f"{frames[0].name} of {package}, called in {ours}" if package and package.startswith("torch.distributed") else ours


def _package_of(file: str) -> str | None:
    """Of torch's, with dots, private parts left out; None for other code."""
    root = Path(torch.__file__).parent
    if not Path(file).is_relative_to(root):
        return None
    parts = Path(file).relative_to(root.parent).with_suffix("").parts
    return ".".join(part for part in parts if not part.startswith("_"))


def why_nothing_is_compiled() -> str | None:
    """What turns torch.compile off as a whole; None where nothing is known to."""
    stance = getattr(_find("torch._dynamo.eval_frame", "_stance", ()), "stance", "default")
    if stance == "force_eager":
        return 'torch.compiler.set_stance("force_eager") holds'
    return "Dynamo is disabled (TORCHDYNAMO_DISABLE)" if dynamo_config().disable else None


@contextlib.contextmanager
def told_of_compiling(start: Callable[[Any], None]) -> Iterator[None]:
    """Have Dynamo say which frame it is about to compile. Without it, no frame has settings of its own."""
    try:
        handler = _get("torch._dynamo", "callback_handler")
    except TorchMoved:
        yield
        return
    handler.register_start_callback(start)
    try:
        yield
    finally:
        handler.remove_start_callback(start)


@contextlib.contextmanager
def as_newer_torch() -> Iterator[None]:
    """Let torch 2.11 capture what newer versions do, as they do; 2.13 is known to need none of it.

    ``torch._check_tensor_all`` leaves a symbol behind that no result of it holds: an error, which a setting turns into a
    warning. And ``torch.compiler.is_exporting()`` is answered with True, so that models take their slow way for exports.
    Its notes about a compilation sort the functions that are not to be captured, and fail with a long message in the log.
    Where names are gone, nothing is done.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        yield
        return
    checks, name = _find("torch.fx.experimental", "_config", contextlib), "soft_pending_unbacked_not_found_error"
    answers = _find("torch._dynamo.variables.torch", "tracing_state_functions", dict)()
    kept = {asked: answers[asked] for asked in [torch.compiler.is_exporting] if asked in answers}
    notes, noting = _get("torch._dynamo", "utils"), "_get_dynamo_config_for_logging"
    note: Any = getattr(notes, noting, None)
    note = getattr(note, "__wrapped__", note)  # another thread is in here, too

    @functools.wraps(note)
    def without_functions() -> Any:
        with dynamo_config().patch(ignore_logging_functions=set()):
            return note()

    try:
        answers.update((asked, asked()) for asked in kept)
        if note is not None:
            setattr(notes, noting, without_functions)
        with checks.patch(name, True) if hasattr(checks, name) else contextlib.nullcontext():
            yield
    finally:
        answers.update(kept)
        if note is not None:
            setattr(notes, noting, note)


class _SizesInStrings:
    """While anybody is inside: strings with a dynamic size in them are formatted when they are read, and not while Dynamo traces.

    Formatting at once makes Dynamo compile for that one size, though it is mostly the text of an error that nobody sees: in
    transformers, every number of visual tokens would be compiled anew. Where names are gone, nothing is done.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._at_once = self._change()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._at_once is not None:
                _find("torch._dynamo.symbolic_convert", "InstructionTranslatorBase")._format_value = self._at_once

    @staticmethod
    def _change() -> Callable[..., None] | None:
        try:
            translator = _get("torch._dynamo.symbolic_convert", "InstructionTranslatorBase")
            size = _get("torch._dynamo.variables", "SymNodeVariable")
            later = _get("torch._dynamo.variables.misc", "StringFormatVariable")
            at_once: Callable[..., None] = translator._format_value
        except (TorchMoved, AttributeError):
            return None

        @functools.wraps(at_once)
        def format_value(self: Any, spec: Any, flags: int) -> None:
            if isinstance(self.stack[-1], size) and spec.is_python_constant():
                self.push(later("{:" + spec.as_python_constant() + "}", [self.pop()], {}))
            else:
                at_once(self, spec, flags)

        translator._format_value = format_value
        return at_once


sizes_in_strings = _SizesInStrings()


# -- torch function modes: generate that merges uncompiled -----------------------------------------------------------------------

current_function_mode = _find("torch.overrides", "_get_current_function_mode", lambda: None)
"""The innermost mode. Without it, ours stays on while a part of the model runs compiled, which then does not take the merge:
it runs unrewritten, and that is told."""

pop_mode_temporarily = _find("torch.overrides", "_pop_mode_temporarily")
"""Leaves it. Without it, a generate that merges by itself raises."""


# -- lowerings -------------------------------------------------------------------------------------------------------------------

def inductor_cache_folder() -> str:
    """Where Inductor keeps what it has compiled; a folder of its kind where it does not say."""
    own = _find("torch._inductor.runtime.cache_dir_utils", "cache_dir", lambda: None)()
    return own or str(Path(tempfile.gettempdir()) / "torchinductor_parvts_fx")


def travels_with_caches(file: str, number: int) -> None:
    """Let a file in that folder, which holds a number, be among what ``torch.compiler.save_cache_artifacts`` saves.

    It goes as a choice of Inductor's own autotuning, which is a file there as well. Without it, the file stays where it is.
    """
    with contextlib.suppress(TorchMoved, AssertionError):  # an artifact of a kind that is not known (any more)
        _get("torch._inductor.runtime.autotune_cache", "AutotuneCacheArtifact")
        _get("torch.compiler._cache", "CacheArtifactManager").record_artifact("autotune", file, number)


def run_inductor(
    module: GraphModule, inputs: Sequence[object], mode: str | None, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """Inductor with a mode and settings, as torch.compile calls it. Without it, only other lowerings work."""
    return _get("torch", "_TorchCompileInductorWrapper")(mode, settings, None)(module, list(inputs))


@contextlib.contextmanager
def compiling_kernels(surround: Callable[[type], type]) -> Iterator[None]:
    """While it lasts, what Inductor writes for a CPU hands its kernels to a class made of the one that compiles them.

    Where that is gone, or another Inductor does not ask for it, each kernel is compiled by itself, as without this.
    """
    own = kernel_compiler()
    if own is None:
        yield
        return
    held = importlib.import_module("torch._inductor.async_compile")
    held.AsyncCompile = surround(own)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        held.AsyncCompile = own  # type: ignore[attr-defined]


@functools.cache
def kernel_compiler() -> type | None:
    """Inductor's class of that kind, asked for once: two threads may be in :func:`compiling_kernels`."""
    try:
        return _get("torch._inductor.async_compile", "AsyncCompile")
    except TorchMoved:
        return None


def kernel_threads() -> int:
    """How many kernels Inductor compiles at once."""
    return _find("torch._inductor.async_compile", "get_compile_threads", lambda: 1)()


@functools.cache
def kernel_bindings(name: str) -> Any:
    """What compiles and loads kernels that Python calls, for one of this name. Without it, each is compiled by itself."""
    bindings, loaded = _get("torch._inductor.codecache", "CppPythonBindingsCodeCache"), dict[str, Any]()
    own = type("Bindings", (bindings,), {"entry_function": name, "cache": loaded, "cache_clear": staticmethod(loaded.clear),
                                         "call_entry_function": bindings.call_entry_function.replace("kernel", name)})
    return _find("torch._inductor.utils", "clear_on_fresh_cache", lambda held: held)(own)


def inductor_settings() -> Sequence[str] | None:
    """The names of Inductor's settings; None where it does not tell."""
    try:
        return _get("torch._inductor", "list_options")()
    except TorchMoved:
        return None


def vector_instructions_probe() -> Callable[[], Any]:
    """What finds out which vector instructions Inductor may use, and keeps that in its cache; nothing where it is gone."""
    with contextlib.suppress(ImportError):  # another torch may keep these elsewhere
        for name in ("cpu_vec_isa", "codecache", "cpp_builder"):  # here: threads must not import what imports each other
            importlib.import_module(f"torch._inductor.{name}")
    return _find("torch._inductor.cpu_vec_isa", "valid_vec_isa_list", lambda: None)


def registered_backend(name: str) -> Callable[..., Any]:
    """A backend that is registered with torch.compile, or that a package's entry point names."""
    return _get("torch._dynamo", "lookup_backend")(name)


def may_vary(tensor: torch.Tensor, axis: int) -> None:
    """Let Dynamo give a name to the size of an axis from the first compile on; without this it does so from the second on."""
    with contextlib.suppress(TorchMoved):
        _get("torch._dynamo", "maybe_mark_dynamic")(tensor, axis)
