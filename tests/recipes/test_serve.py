"""``examples/serve.py`` as a process of its own: hundreds of requests at once, metrics, and what it says of bad input."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

import parvts_fx
from tests.recipes import example
from tests.small_processors import save
from tests.supported import ROOT

for needed in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(needed)
httpx = pytest.importorskip("httpx")
parser = pytest.importorskip("prometheus_client.parser")
psutil = pytest.importorskip("psutil")

OPTIONS = {"lowering": "eager", "keep_tokens": 4, "migration_depth": 1}
ARGUMENTS = ["--lowering", "eager", "--keep-tokens", "4", "--migration-depth", "1", "--device", "cpu"]
SIZES = [(24, 16), (16, 32), (24, 24), (32, 24), (32, 32), (40, 24), (48, 24), (32, 48)]
"""In pixels; eight by eight are a token."""
TEXTS = ["w7 w8", "w20 w21 w22 w23 w24", "w9 w31 w44"]
SAMPLES = [(picture, text) for picture in range(len(SIZES)) for text in TEXTS]
NEW_TOKENS = 8
PENALTY = 2.0
"""On repeated tokens: small models of random weights else repeat one, and many prompts get the same answer."""


def picture_of(number: int) -> Image.Image:
    width, height = SIZES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))


def address_of(number: int) -> str:
    written = io.BytesIO()
    picture_of(number).save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


@dataclasses.dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    metrics_port: int | None

    def post(self, *content: Any, **more: Any) -> Any:
        """The answer to a message of text and of addresses of pictures, as ``("text",)``, ``("image_url", "data:...")``."""
        body = {"messages": [{"role": "user", "content": list(content)}], "max_tokens": NEW_TOKENS,
                "frequency_penalty": PENALTY, **more}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=300, trust_env=False)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Values by name and labels, as Prometheus' own client reads them."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", trust_env=False).text
        return {(sample.name, *sample.labels.values()): sample.value
                for family in parser.text_string_to_metric_families(text) for sample in family.samples}

    def listens_on(self) -> set[tuple[str, int]]:
        return {tuple(held.laddr) for held in psutil.Process(self.process.pid).net_connections("inet") if held.status == "LISTEN"}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def picture_part(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        return [opened.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def command(folder: Path, port: int, *more: object) -> list[str]:
    return [sys.executable, "examples/serve.py", str(folder), "--port", str(port), *ARGUMENTS, *map(str, more)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def serving(folder: Path, log: Path, with_metrics: bool) -> Iterator[Server]:
    port, metrics_port = free_ports(2)
    more = ["--metrics-port", metrics_port] if with_metrics else []
    with log.open("w") as written:
        process = subprocess.Popen(
            command(folder, port, *more), cwd=ROOT, stdout=written, stderr=written, text=True, env=ENVIRONMENT)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.2)
        yield Server(process, port, metrics_port if with_metrics else None)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("paddleocr_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.txt"


@pytest.fixture(scope="module")
def server(folder: Path, log: Path) -> Iterator[Server]:
    with serving(folder, log, with_metrics=True) as started:
        yield started


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[str]:
    """What each sample's prompt gets by itself, in this process."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    parvts_fx.compile(model, strict=True, **OPTIONS)
    answers = []
    for picture, text in SAMPLES:
        content = [{"type": "image", "image": picture_of(picture)}, text_part(text)]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, repetition_penalty=1 + PENALTY)
        assert parvts_fx.last_call(model).kept_tokens == (4,)
        answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
    assert len(set(answers)) == len(SAMPLES), "answers tell prompts apart"
    return answers


def ask_all(server: Server, rounds: int) -> list[str]:
    """Every sample as often as there are rounds, sixteen requests at once; answers in the order of the samples."""
    addresses = [address_of(number) for number in range(len(SIZES))]

    def ask(sample: tuple[int, str]) -> str:
        answer = server.post(picture_part(addresses[sample[0]]), text_part(sample[1]))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(16) as clients:
        return list(clients.map(ask, itertools.chain.from_iterable([SAMPLES] * rounds)))


def test_hundreds_of_requests_at_once(server: Server, alone: list[str]) -> None:
    """All are answered, each as alone; all are pruned; and the second half of them compiles nothing and needs no more memory."""
    before, rounds = server.metrics(), 6
    assert ask_all(server, rounds) == alone * rounds
    half = server.metrics()
    assert ask_all(server, rounds) == alone * rounds
    after = server.metrics()
    requests = 2 * rounds * len(SAMPLES)
    tokens = 2 * rounds * sum(width * height // 64 * len(TEXTS) for width, height in SIZES)
    assert requests >= 200
    assert grown(before, after, "parvts_prompts_total", "rewritten", "") == requests
    assert grown(before, after, "parvts_visual_tokens_total") == tokens
    assert grown(before, after, "parvts_kept_tokens_total") == 4 * requests
    assert after["parvts_compiled_graphs",] == half["parvts_compiled_graphs",] > 0
    assert grown(half, after, "process_resident_memory_bytes") < 32 * 2**20


def grown(before: dict[tuple[str, ...], float], after: dict[tuple[str, ...], float], *series: str) -> float:
    return after[series] - before.get(series, 0)


def test_streamed(server: Server, alone: list[str]) -> None:
    picture, text = SAMPLES[5]
    answer = server.post(picture_part(address_of(picture)), text_part(text), stream=True)
    chunks = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in answer.text.splitlines() if line]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == alone[5]


def test_bad_requests(server: Server, log: Path, alone: list[str]) -> None:
    """Status 400 and one line; the server goes on."""
    good, text = address_of(0), text_part("w7 w8")
    no_place = {"chat_template": "{{ messages[0]['content'][-1]['text'] }}"}
    whole = base64.b64decode(good.partition(",")[2])
    for answer, words in [
        (server.post(picture_part("data:image/png;base64,AAAA"), text), "a picture cannot be read"),
        (server.post(picture_part("data:image/png;base64,%%"), text), "a picture cannot be read"),
        (server.post(picture_part("data:image/png;base64," + base64.b64encode(whole[:90]).decode()), text), "cannot be read"),
        (server.post(picture_part("/etc/hostname"), text), "each as a data: URL"),
        (server.post(picture_part("http://127.0.0.1/picture.png"), text), "each as a data: URL"),
        (server.post(picture_part(good), text, chat_template_kwargs=no_place), "does not take this prompt: The total number"),
        (server.post(picture_part(good), text_part("w7 <image> w8")), "Found total 2 <image> tokens and 1 images"),
        (server.post(text_part("w7 <image> w8")), "no images were passed"),
    ]:
        assert answer.status_code == 400 and words in answer.json()["detail"], answer.text
        assert "\n" not in answer.json()["detail"]
    picture, question = SAMPLES[0]
    assert server.post(picture_part(good), text_part(question)).json()["choices"][0]["message"]["content"] == alone[0]
    assert "Traceback" not in log.read_text()


def test_prompts_without_pictures_are_counted_with_their_reason(server: Server) -> None:
    series = ("parvts_prompts_total", "unrewritten", "no visual features are merged in this call")
    before = server.metrics()
    assert server.post(text_part("w7 w8 w9")).status_code == 200
    assert grown(before, server.metrics(), *series) == 1


def test_listens_on_this_machine_alone(server: Server) -> None:
    assert server.listens_on() == {("127.0.0.1", server.port), ("127.0.0.1", server.metrics_port)}
    assert httpx.get(f"http://127.0.0.1:{server.port}/metrics", trust_env=False).status_code == 404


def test_no_metrics_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    with serving(folder, tmp_path / "log.txt", with_metrics=False) as started:
        assert started.listens_on() == {("127.0.0.1", started.port)}


def refused(folder: Path, port: int) -> str:
    done = subprocess.run(command(folder, port), cwd=ROOT, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("serve.py:")]
    assert done.stderr.endswith(line + "\n")
    return line


def test_what_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    """One line, and an exit code."""
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        assert f"port {used} of 127.0.0.1 cannot be listened on: [Errno 98] Address already in use" in refused(folder, used)
    assert "/no/such/folder cannot be served" in refused(Path("/no/such/folder"), port)
    assert "has no chat template" in refused(save("llava", tmp_path / "llava"), port)


def test_reasons_with_sizes_are_one_series() -> None:
    serving = example("serve")
    for sizes in ("16, 32, 0", "4, 8", "12"):
        serving["count"](parvts_fx.CallRecord(False, f"the samples have different numbers of visual tokens: {sizes}"))
    reasons = [sample.labels["reason"] for family in serving["PROMPTS"].collect() for sample in family.samples]
    assert set(reasons) == {"the samples have different numbers of visual tokens: N"}
