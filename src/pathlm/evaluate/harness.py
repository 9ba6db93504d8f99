"""Any lm-eval task on our models, or on any Hugging Face causal language model: an adapter, and `run` for a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from pathlm.evaluate.checkpoint import evaluating, start_token
from pathlm.evaluate.choices import encode_pair, likelihoods, read_questions
from pathlm.evaluate.lm import reach
from pathlm.evaluate.subject import Measure, Subject, at_once

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"lm-eval tasks need the `eval` extra: pip install 'pathlm[eval]' ({error})", name=error.name) from error

_NEW_TOKENS = 256


class HarnessModel(LM):
    """Answers lm-eval's requests with a causal language model. Every text begins with the start token, as documents do in training.

    `context` limits the tokens that the model sees (default: its `max_position_embeddings`); what is too long loses its beginning.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16, context: int | None = None, name: str = ""
    ) -> None:
        super().__init__()
        if start_token(tokenizer) is None:
            raise ValueError(f"tokenizer={type(tokenizer).__name__}: has neither bos_token nor eos_token to start a text with")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.context, _ = reach(model, context)
        self.name = name

    @property
    def tokenizer_name(self) -> str:
        """Return a name for lm-eval's cache of requests."""
        return self.name.replace("/", "__")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), the log-likelihood in nats and whether greedy decoding would write it."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        found = likelihoods(self.model, pairs, context=self.context, batch_size=self.batch_size)
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-likelihood of whole texts, read in windows that count every token once, as lm-eval defines them."""
        owners, pairs = [], []
        for number, request in enumerate(requests):
            tokens = self.tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
            start = start_token(self.tokenizer)
            for window in get_rolling_token_windows(tokens, prefix_token=start, max_seq_len=self.context, context_len=1):
                owners.append(number)
                pairs.append(make_disjoint_window(window))
        totals = [0.0] * len(requests)
        for number, one in zip(owners, likelihoods(self.model, pairs, context=self.context, batch_size=self.batch_size), strict=True):
            totals[number] += one.logprob
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return, for each (context, options), what the model writes before the first of `options["until"]`, greedily by default."""
        with evaluating(self.model), torch.inference_mode():
            return [self._write(*request.args) for request in requests]

    def _write(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        new = min(int(options.get("max_gen_toks", options.get("max_new_tokens", _NEW_TOKENS))), self.context - 1)
        start = start_token(self.tokenizer)
        ids = [start, *self.tokenizer(context, add_special_tokens=False)["input_ids"]][-(self.context - new) :]
        sampled = bool(options.get("do_sample", False)) and float(options.get("temperature", 1.0)) > 0

        def is_done(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            text = self.tokenizer.decode(input_ids[0, len(ids) :])
            return torch.tensor([any(stop in text for stop in stops)], device=input_ids.device)

        input_ids = torch.tensor([ids], device=self.model.device)
        how = {"temperature": float(options.get("temperature", 1.0)), "top_p": float(options.get("top_p", 1.0))} if sampled else {}
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end
        written = self.model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=new, do_sample=sampled, stopping_criteria=[is_done],
            eos_token_id=end, pad_token_id=pad, **how,
        )  # fmt: skip
        text = str(self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text


def choice_task(file: Path | str, *, name: str | None = None, delimiter: str = " ") -> dict[str, Any]:
    """Describe a file of `pathlm.evaluate.choices` questions as an lm-eval task. `acc` is raw likelihood and `acc_bytes` per byte."""
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm", "acc_bytes")]
    return {
        "task": name or Path(file).stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }


def prepare(
    subject: Subject,
    tasks: Sequence[str | Path | dict[str, Any]],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 16,
    include_path: Path | str | None = None,
    context: int | None = None,
) -> Measure:
    """Make ready to evaluate a model on lm-eval tasks; measuring returns their metrics by task, also written to `eval.json`.

    A task is a name that lm-eval knows (with `include_path`, also from a folder of YAML files), a description as a dictionary, or a
    `.jsonl` file of questions (see `choice_task`). `limit` keeps the first so many documents of each. Data sets that are not local need a
    network. `context` limits the tokens that the model sees. Raises `FileNotFoundError` for a file that does not exist and `ValueError` for
    a folder without a model or a tokenizer, and for a context that the model does not have or that has to be said.
    """
    for task in tasks:
        if _is_file(task):
            read_questions(str(task))
    model, tokenizer = subject.with_tokenizer()
    adapted = HarnessModel(model, tokenizer, batch_size=batch_size, context=context, name=str(subject.folder))

    def measure() -> dict[str, dict[str, Any]]:
        found = evaluate(adapted, tasks, limit=limit, fewshot=fewshot, include_path=include_path)
        file = subject.note("eval.json", "lm-eval", {"checkpoint": str(subject.place), "budget": subject.budget, "tasks": found})
        subject.print(table(found), note=f"written to {file}")
        return found

    return measure


run = at_once(prepare)


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Return the metrics of `run` as a table, a row per task and metric."""
    shown = Table("task", "metric")
    shown.add_column("value", justify="right")
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                shown.add_row(task, name.removesuffix(",none"), f"{value:.4f}")
    return shown


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str | Path | dict[str, Any]],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: Path | str | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model that is already loaded; see `run`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    chosen = [choice_task(str(task)) if _is_file(task) else task for task in tasks]
    by_name = any(not isinstance(task, dict) for task in chosen)
    manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=by_name)
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags} if by_name else set()
    if unknown := [task for task in chosen if isinstance(task, str) and task not in known]:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and a file of questions ends in .jsonl"
        )
    found = simple_evaluate(
        model, tasks=chosen, num_fewshot=fewshot, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert found is not None, "only ranks other than the first return nothing, and there is one"
    return {task: dict(metrics) for task, metrics in found["results"].items()}


def _is_file(task: str | Path | dict[str, Any]) -> bool:
    """Whether a task is a file of questions."""
    return not isinstance(task, dict) and str(task).endswith(".jsonl")
