"""Answers to a table of pictures and questions, by Ray Data: prompts are pruned, in as many processes as there are actors.

    python examples/ray_batches.py FOLDER_OR_HUB_NAME questions.csv answers/ --keep-tokens 64 --actors 2
    python examples/ray_batches.py ... --address auto --actors 16 --gpus-per-actor 1      # on a cluster that runs

The table, CSV or Parquet, has a column ``picture``, paths from the table's folder on (empty where there is none), and a column
``question``. Batches are taken from it as they come: pictures of any size, rows without one. The folder of answers gets Parquet
files with the table's columns and ``answer``, ``visual_tokens``, ``kept_tokens``, ``reason`` where nothing of a batch was pruned,
and ``error`` where a row cannot be answered. Rows come in any order.

Each actor loads and compiles the model once. Where one dies, Ray starts it anew and hands it the blocks that it had not finished;
what it had half done is dropped, so that no row is lost or doubled. Where this process dies, the run begins anew.

Needs ``pip install "ray[data]" pillow``. On a cluster the model, the table and the pictures are in storage that all machines see.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import ray
import torch
import transformers
from jinja2 import TemplateError  # transformers renders templates with it
from PIL import Image, ImageOps

import parvts_fx

NEEDED, ADDED = ("picture", "question"), ("answer", "visual_tokens", "kept_tokens", "reason", "error")


class Answerer:
    """An actor: a compiled model, called with batches of the table.

    Args:
        model: its folder or hub name.
        folder: where the table's paths begin.
        options: those of :func:`parvts_fx.compile`.
        generating: those of ``generate``.
    """

    def __init__(self, model: str, folder: Path, options: Mapping[str, Any], generating: Mapping[str, Any]):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval().to(self._device)
        self._processor = transformers.AutoProcessor.from_pretrained(model)
        self._folder, self._generating = folder, generating
        parvts_fx.compile(self._model, **options)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        found = self._answer(batch.to_pylist())
        for name in ADDED:
            kind = pyarrow.int64() if name.endswith("tokens") else pyarrow.string()  # a batch of nothing but errors has it too
            batch = batch.append_column(name, pyarrow.array([row[name] for row in found], kind))
        return batch

    def _answer(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What is added to each row. A row that cannot be read is found by taking those of its batch one by one."""
        try:
            inputs = self._read(rows)
        except (OSError, ValueError, IndexError, KeyError, TypeError, TemplateError, Image.DecompressionBombError) as error:
            if len(rows) == 1:
                return [{"answer": "", "visual_tokens": 0, "kept_tokens": 0, "reason": "", "error": first_line(error)}]
            return [added for row in rows for added in self._answer([row])]
        made = self._model.generate(**inputs, **self._generating)
        answers = self._processor.batch_decode(made[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        record = parvts_fx.last_call(self._model)
        assert record is not None
        counts = zip(record.visual_tokens or [0] * len(rows), record.kept_tokens or [0] * len(rows), strict=True)
        return [{"answer": answer.strip(), "visual_tokens": visual, "kept_tokens": kept, "reason": record.reason, "error": ""}
                for answer, (visual, kept) in zip(answers, counts, strict=True)]

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """What ``generate`` takes; the rows' prompts are padded on the left, behind which answers go on."""
        contents = [[*self._pictures(row["picture"]), {"type": "text", "text": str(row["question"])}] for row in rows]
        inputs = self._processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt", processor_kwargs={"padding": True, "padding_side": "left"})
        return inputs.to(self._device, self._model.dtype)

    def _pictures(self, path: str | None) -> list[dict[str, Any]]:
        if not path:
            return []
        with Image.open(self._folder / path) as image:
            return [{"type": "image", "image": ImageOps.exif_transpose(image).convert("RGB")}]


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or hub name of a model with its processor")
    parser.add_argument("table", type=Path, help="CSV or Parquet file with the columns picture and question")
    parser.add_argument("answers", type=Path, help="folder for the answers, new or empty")
    parser.add_argument("--address", help="of a running cluster, or auto (default: Ray is started here, for this run)")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus-per-actor", type=float, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a call, and those done anew where an actor dies")
    parser.add_argument("--rows-per-file", type=int, default=1024, help="the least, but for the last file")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--keep-tokens", type=int, help="visual tokens to keep of each prompt (default: a ninth)")
    parser.add_argument("--migration-depth", type=int, default=3, help="decoder layers that run on all of them")
    parser.add_argument("--lowering", default="inductor", help='what compiles the rewritten graph; "eager" starts sooner')
    return parser.parse_args()


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """For :func:`parvts_fx.compile`."""
    kept = {} if given.keep_tokens is None else {"keep_tokens": given.keep_tokens}
    return {"lowering": given.lowering, "migration_depth": given.migration_depth, **kept}


def check(given: argparse.Namespace) -> None:
    """Find out here what would otherwise be told by an actor, in many lines.

    Raises:
        ValueError: something cannot be used.
        OSError: the same.
    """
    if not given.table.is_file() or given.table.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{given.table} is no CSV or Parquet file")
    if given.answers.exists() and any(given.answers.iterdir()):
        raise ValueError(f"{given.answers} is not empty: answers of two runs would be mixed")
    parvts_fx.Options(**options_of(given))
    transformers.AutoConfig.from_pretrained(given.model)


def read(path: Path) -> ray.data.Dataset:
    """The table.

    Raises:
        ValueError: its columns are not what is needed.
    """
    table = (ray.data.read_csv if path.suffix == ".csv" else ray.data.read_parquet)(str(path))
    columns = table.columns() or []
    if not set(NEEDED) <= set(columns) or set(ADDED) & set(columns):
        raise ValueError(f"{path} needs the columns {', '.join(NEEDED)}, and none of {', '.join(ADDED)}: {', '.join(columns)}")
    return table


def answer(given: argparse.Namespace) -> str:
    """Run; returns what to say of it."""
    # each actor takes one of the logical CPUs; reading and writing need one beside them, or nothing would ever be read
    ray.init(address=given.address, **({} if given.address else {"num_cpus": given.actors + 1, "include_dashboard": False}))
    ray.data.DataContext.get_current().enable_progress_bars = False
    table = read(given.table)
    # a file may be one block, and a block goes to one actor: make each batch one
    answers = table.repartition(target_num_rows_per_block=given.batch_size, strict=True).map_batches(
        Answerer, batch_size=given.batch_size, batch_format="pyarrow", num_cpus=1, num_gpus=given.gpus_per_actor,
        compute=ray.data.ActorPoolStrategy(size=given.actors), fn_constructor_kwargs={
            "model": given.model, "folder": given.table.resolve().parent, "options": options_of(given),
            "generating": {"max_new_tokens": given.new_tokens, "repetition_penalty": given.repetition_penalty}})
    answers.write_parquet(str(given.answers.resolve()), min_rows_per_file=given.rows_per_file)
    written, rows = pyarrow.parquet.read_table(given.answers, columns=list(ADDED[1:])), table.count()
    if len(written) != rows:
        raise ValueError(f"{given.answers} has {len(written)} rows, and the table {rows}")
    visual, kept = (sum(written[name].to_pylist()) for name in ("visual_tokens", "kept_tokens"))
    failed = sum(map(bool, written["error"].to_pylist()))
    return f"{rows} rows, {failed} of them with an error; kept {kept} of {visual} visual tokens"


if __name__ == "__main__":
    chosen = parse()
    try:
        check(chosen)
        print(answer(chosen))
    except (OSError, ValueError) as error:
        sys.exit(f"ray_batches.py: {first_line(error)}")
