"""A server for one multimodal model whose prompts are pruned: that of transformers, with two hooks where it loads the model.

    python examples/serve.py FOLDER_OR_HUB_NAME --keep-tokens 64 --metrics-port 9400
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"max_tokens": 32, "messages": [{
        "role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                                    {"type": "text", "text": "What is this?"}]}]}'

``transformers serve`` brings the OpenAI-compatible API, streaming and the order of requests: one after another, in a thread of
their own (it batches continuously for models of text alone). The hooks compile the model and answer bad input with a line.

It is for one machine whose users trust each other: no keys, no encryption, no limit on how many requests wait, and the other
addresses of ``transformers serve`` are there as well (``/load_model`` loads other models). It listens on 127.0.0.1 unless told
otherwise, and Prometheus finds metrics only where ``--metrics-port`` puts them.

Needs ``pip install "transformers[serving]" prometheus-client pillow``.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fastapi import HTTPException
from jinja2 import TemplateError  # transformers renders templates with it
from PIL import Image, ImageOps
from prometheus_client import Counter, Gauge, start_http_server
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

import parvts_fx

PROMPTS = Counter("parvts_prompts", "Calls of the model with a prompt", ["graph", "reason"])
VISUAL = Counter("parvts_visual_tokens", "Visual tokens of all prompts")
KEPT = Counter("parvts_kept_tokens", "Visual tokens that prompts were left with")
COMPILED = Gauge("parvts_compiled_graphs", "Graphs that Dynamo has captured so far")


def count(record: parvts_fx.CallRecord) -> None:
    """Put the record of a call into the metrics.

    Reasons may hold sizes, of which each would be a series of its own for ever.
    """
    PROMPTS.labels(record.graph, re.sub(r"\d+(, \d+)*", "N", record.reason)).inc()
    VISUAL.inc(sum(record.visual_tokens))
    KEPT.inc(sum(record.kept_tokens))


def captured_graphs() -> float:
    return float(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class PruningManager(model_manager.ModelManager):
    """Loads models as ``transformers serve`` does, and compiles them."""

    options: Mapping[str, Any] = {}
    """Those of :func:`parvts_fx.compile`."""

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return parvts_fx.compile(super()._load_model(*args, **kwargs), on_call=count, **self.options)

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        processor = super()._load_processor(*args, **kwargs)
        if getattr(processor, "image_processor", None) is None or not getattr(processor, "chat_template", None):
            raise ValueError("its processor takes no pictures, or has no chat template that says where they stand")
        processor.apply_chat_template = functools.partial(read_request, processor.apply_chat_template)
        return processor


def read_request(apply: Callable[..., Any], messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> Any:
    """What a processor makes of a request's messages.

    Raises:
        HTTPException: status 400 and one line, for pictures that cannot be read, and for prompts that the processor does not
            take: with more places than pictures, or without a place for one.
    """
    messages = [{**message, "content": [read_part(part) for part in message["content"]]} for message in messages]
    try:
        return apply(messages, **kwargs)
    except (ValueError, IndexError, KeyError, TypeError, TemplateError) as error:
        raise HTTPException(400, f"the processor does not take this prompt: {first_line(error)}") from error


def read_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of a message, with the picture in place of its address.

    The processor would open any file of this machine that a request names, and fetch from any address.
    """
    if part["type"] == "text":
        return part
    if part["type"] != "image" or not part["url"].startswith("data:"):
        raise HTTPException(400, "a prompt here is text and pictures, each as a data: URL (data:image/png;base64,...)")
    try:
        with Image.open(io.BytesIO(base64.b64decode(part["url"].partition(",")[2], validate=True))) as image:
            return {"type": "image", "image": ImageOps.exif_transpose(image).convert("RGB")}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, "a picture cannot be read: it is no whole PNG, JPEG or the like in base64") from error


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def check_port(host: str, port: int) -> None:
    """Find a port in use before a model is loaded for it.

    Raises:
        OSError: it cannot be listened on.
    """
    with socket.create_server((host, port)):
        pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or hub name of a model with its processor")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, help="serve metrics for Prometheus there (default: nowhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-tokens", type=int, help="visual tokens to keep of each prompt (default: a ninth)")
    parser.add_argument("--migration-depth", type=int, default=3, help="decoder layers that run on all of them")
    parser.add_argument("--lowering", default="inductor", help='what compiles the rewritten graph; "eager" starts sooner')
    return parser.parse_args()


def listen(given: argparse.Namespace) -> None:
    """Check what is cheap to find wrong first, load, and serve until interrupted."""
    for port in (given.port, given.metrics_port):
        try:
            if port is not None:
                check_port(given.host, port)
        except (OSError, OverflowError) as error:
            sys.exit(f"serve.py: port {port} of {given.host} cannot be listened on: {first_line(error)}")
    if given.metrics_port is not None:
        COMPILED.set_function(captured_graphs)
        start_http_server(given.metrics_port, addr=given.host)
    kept = {} if given.keep_tokens is None else {"keep_tokens": given.keep_tokens}
    PruningManager.options = {"lowering": given.lowering, "migration_depth": given.migration_depth, **kept}
    model_manager.ModelManager = PruningManager  # Serve looks it up there
    try:
        parvts_fx.Options(**PruningManager.options)
        Serve(force_model=given.model, device=given.device, host=given.host, port=given.port, log_level="error")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"serve.py: {given.model} cannot be served: {first_line(error)}")


if __name__ == "__main__":
    listen(parse())
