"""Tasks of lm-evaluation-harness by its own code, with our engine in the place of its models."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import CalledWrongly, UserError
from llmctl.evaluate import perplexity
from llmctl.evaluate.harness_items import HarnessItems, Record
from llmctl.evaluate.judge import LanguageModelJudge
from llmctl.evaluate.likelihood import Fork
from llmctl.evaluate.settings import EvalSettings
from llmctl.evaluate.summary import Number
from llmctl.generation.settings import Sampling, resolve

log = logging.getLogger("llmctl")
_MAX_NEW_TOKENS = 256  # the harness' own default


def require() -> None:
    """Raise CalledWrongly, before a model is loaded, where the harness is not installed."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise CalledWrongly("--harness needs lm-evaluation-harness", hint="pip install 'llmctl[harness]'")


def run(
    judge: LanguageModelJudge,
    words: Sequence[str],
    settings: EvalSettings,
    begin: Callable[[str], list[Record]],
    append: Callable[[Record], None],
) -> Iterator[tuple[str, list[Number]]]:
    """Of each task, a name or the path of a task file of the harness: its name and its numbers.

    Before that its items come one by one, as `HarnessItems` describes `begin` and `append`.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, *args, **kwargs):
            self.loaded = super().load(*args, **kwargs)
            return self.loaded

    paths = [Path(word) for word in words if word.endswith((".yaml", ".yml"))]
    if missing := next((path for path in paths if not path.exists()), None):
        raise UserError(f"{missing}: no such file")
    manager = Manager(include_path=sorted({str(path.parent) for path in paths}) or None)
    names = [_name_in(word) if Path(word) in paths else word for word in words]
    known = set(manager.all_tasks)
    if unknown := next((name for name in names if name not in known), None):
        raise CalledWrongly(
            f"--harness {unknown}: the harness has no such task", hint="lm_eval --tasks list shows them"
        )
    found = lm_eval.simple_evaluate(
        model=engine(judge, HarnessItems(manager, begin, append)),
        tasks=names,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        fewshot_random_seed=settings.seed,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn and settings.apply_chat_template,
        system_instruction=settings.system or None,
        log_samples=False,
        bootstrap_iters=1000,
    )
    for name, task in manager.loaded["tasks"].items():
        count = len({each.doc_id for each in task.instances})
        yield name, list(_numbers(name, found["results"][name], count))


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


def engine(judge: LanguageModelJudge, items: HarnessItems):
    """An LM of the harness whose likelihoods and texts are ours."""
    from lm_eval.api.model import LM

    class Engine(LM):
        tokenizer_name = "llmctl"

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return items.answered(requests, lambda asked: likelihoods(judge, asked))

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            work = lambda asked: ((place, rolling(judge, text)) for place, (text,) in enumerate(asked))  # noqa: E731
            return items.answered(requests, work)

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return items.answered(requests, lambda asked: texts(judge, asked))

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return judge.session.tokenizer.render_chat(chat_history, add_generation_prompt).text

        def chat_template(self, chat_template=False) -> str:
            return judge.session.tokenizer.chat_template or ""

    return Engine()


def likelihoods(
    judge: LanguageModelJudge, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """The place of each continuation with (log-likelihood, is greedy), in any order; equal contexts run once, long ones
    lose their beginning."""
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
    for place, scored in judge.scorer.score(forks):
        for (number, _), likelihood in zip(owners[place], scored, strict=True):
            yield number, (likelihood.logprob, likelihood.is_greedy)


def rolling(judge: LanguageModelJudge, text: str) -> float:
    """Log-likelihood of a whole text, in windows of the model's context, each token predicted once."""
    size = perplexity.sizes(judge.room, None, None)
    ids = judge.encoder.text(text)
    forks = list(perplexity.windows((judge.encoder.prefix_id, *ids), *size))
    return math.fsum(each.logprob for _, found in judge.scorer.score(forks, asks_greedy=False) for each in found)


def texts(judge: LanguageModelJudge, requests: Sequence[tuple[str, dict]]) -> Iterator[tuple[int, str]]:
    """The place of each prompt with what is generated for it by its own settings, in any order; long prompts lose their
    beginning."""
    groups: dict[Sampling, list[int]] = {}
    for number, (_, how) in enumerate(requests):
        groups.setdefault(_sampling(how), []).append(number)
    n_cut = 0
    for sampling, numbers in groups.items():
        prompts = [judge.encoder.prompt(requests[number][0]) for number in numbers]
        if judge.room is not None:
            kept = max(1, judge.room - sampling.max_new_tokens)
            n_cut += sum(len(ids) > kept for ids in prompts)
            prompts = [ids[-kept:] for ids in prompts]
        for place, completion in judge.generate(prompts, sampling):
            yield numbers[place], completion.text
    _say_cut(n_cut, len(requests))


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
