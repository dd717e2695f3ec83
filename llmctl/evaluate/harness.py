"""Tasks of lm-evaluation-harness by its own code, with our engine in the place of its models."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import CalledWrongly, UserError
from llmctl.evaluate import perplexity
from llmctl.evaluate.judge import LanguageModelJudge
from llmctl.evaluate.likelihood import Fork
from llmctl.evaluate.settings import EvalSettings
from llmctl.evaluate.summary import Number
from llmctl.generation.settings import Sampling, resolve

log = logging.getLogger("llmctl")
_MAX_NEW_TOKENS = 256  # the harness' own default
Record = dict[str, Any]


def require() -> None:
    """Raise CalledWrongly, before a model is loaded, where the harness is not installed."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise CalledWrongly("--harness needs lm-evaluation-harness", hint="pip install 'llmctl[harness]'")


def run(
    judge: LanguageModelJudge, words: Sequence[str], settings: EvalSettings
) -> Iterator[tuple[str, list[Record], list[Number]]]:
    """Of each task, a name or the path of a task file of the harness: its name, its items' records and its numbers."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    paths = [Path(word) for word in words if word.endswith((".yaml", ".yml"))]
    if missing := next((path for path in paths if not path.exists()), None):
        raise UserError(f"{missing}: no such file")
    manager = TaskManager(include_path=sorted({str(path.parent) for path in paths}) or None)
    names = [_name_in(word) if Path(word) in paths else word for word in words]
    known = set(manager.all_tasks)
    if unknown := next((name for name in names if name not in known), None):
        raise CalledWrongly(
            f"--harness {unknown}: the harness has no such task", hint="lm_eval --tasks list shows them"
        )
    found = lm_eval.simple_evaluate(
        model=engine(judge),
        tasks=names,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        fewshot_random_seed=settings.seed,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn and settings.apply_chat_template,
        system_instruction=settings.system or None,
        log_samples=True,
        bootstrap_iters=1000,
    )
    for name, samples in found["samples"].items():
        records = list(_records(name, samples))
        yield name, records, list(_numbers(name, found["results"][name], len(records)))


def _name_in(path: str) -> str:
    import yaml

    class Loader(yaml.SafeLoader):
        """Their files name functions; only the task's name is wanted here."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    return str(content.get("task", Path(path).stem))


def _numbers(task: str, results: dict[str, Any], count: int) -> Iterator[Number]:
    """Metrics come as "acc,none" with "acc_stderr,none" beside them; the part behind the comma names a filter."""
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else key
        yield Number(task, name, float(value), float(error) if isinstance(error, (int, float)) else None, count)


def _records(task: str, samples: Sequence[dict[str, Any]]) -> Iterator[Record]:
    """One for each item; a sample of each filter gives scores with its name."""
    merged: dict[int, Record] = {}
    for sample in samples:
        record = merged.setdefault(sample["doc_id"], {"task": task, "id": sample["doc_id"], "scores": {}})
        end = "" if sample.get("filter", "none") == "none" else f",{sample['filter']}"
        for metric in sample.get("metrics", ()):
            if isinstance(value := sample.get(metric), (int, float)) and math.isfinite(value):
                record["scores"][metric + end] = float(value)
        record["responses"] = sample.get("filtered_resps")
    yield from merged.values()


def engine(judge: LanguageModelJudge):
    """An LM of the harness whose likelihoods and texts are ours."""
    from lm_eval.api.model import LM

    class Engine(LM):
        tokenizer_name = "llmctl"

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return likelihoods(judge, [each.args for each in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            return [rolling(judge, each.args[0]) for each in requests]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return texts(judge, [each.args for each in requests])

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return judge.session.tokenizer.render_chat(chat_history, add_generation_prompt).text

        def chat_template(self, chat_template=False) -> str:
            return judge.session.tokenizer.chat_template or ""

    return Engine()


def likelihoods(judge: LanguageModelJudge, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each continuation; equal contexts run once, long ones lose their beginning."""
    continuations: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    n_cut = 0
    for number, (context, continuation) in enumerate(pairs):
        (fork,) = judge.encoder.fork(context, [continuation], f"request {number + 1}")
        kept, ids = tuple(fork.context), tuple(fork.continuations[0])
        if judge.room is not None and len(kept) + len(ids) - 1 > judge.room:
            n_cut += 1
            kept = kept[-max(1, judge.room + 1 - len(ids)) :]
        continuations.setdefault(kept, []).append((number, ids))
    _say_cut(n_cut, len(pairs))
    owners = list(continuations.values())
    forks = [Fork(context, [ids for _, ids in each]) for context, each in continuations.items()]
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for place, scored in judge.scorer.score(forks):
        for (number, _), likelihood in zip(owners[place], scored, strict=True):
            found[number] = (likelihood.logprob, likelihood.is_greedy)
    return found


def rolling(judge: LanguageModelJudge, text: str) -> float:
    """Log-likelihood of a whole text, in windows of the model's context, each token predicted once."""
    size = perplexity.sizes(judge.room, None, None)
    ids = judge.encoder.text(text)
    forks = list(perplexity.windows((judge.encoder.prefix_id, *ids), *size))
    return math.fsum(each.logprob for _, found in judge.scorer.score(forks) for each in found)


def texts(judge: LanguageModelJudge, requests: Sequence[tuple[str, dict]]) -> list[str]:
    """What is generated for each prompt with its own settings; long prompts lose their beginning."""
    found, groups = [""] * len(requests), {}
    for number, (_, how) in enumerate(requests):
        groups.setdefault(_sampling(how), []).append(number)
    n_cut = 0
    for sampling, numbers in groups.items():
        prompts = [judge.encoder.text(requests[number][0]) or (judge.encoder.prefix_id,) for number in numbers]
        if judge.room is not None:
            kept = max(1, judge.room - sampling.max_new_tokens)
            n_cut += sum(len(ids) > kept for ids in prompts)
            prompts = [ids[-kept:] for ids in prompts]
        for place, completion in judge.generate(prompts, sampling):
            found[numbers[place]] = completion.text
    _say_cut(n_cut, len(requests))
    return found


def _sampling(how: dict[str, Any]) -> Sampling:
    stop = how.get("until") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(each for each in stop if each)
    temperature = float(how.get("temperature") or 0.0) if how.get("do_sample", how.get("temperature")) else 0.0
    values = {"max_new_tokens": int(how.get("max_gen_toks", _MAX_NEW_TOKENS)), "stop": stop, "temperature": temperature}
    values |= {name: how[name] for name in ("top_p", "top_k") if temperature and name in how}
    return resolve(Sampling(**values))


def _say_cut(count: int, total: int) -> None:
    if count:
        log.warning("%d of %d prompts of the harness lost their beginning to fit into the context", count, total)
