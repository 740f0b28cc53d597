"""Time language models: from a user's history and candidates to letters' scores, or from his history to search queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.config import Bench, Config
from llmrec.data.sequences import Sequences
from llmrec.data.tables import load_titles
from llmrec.errors import UserError
from llmrec.prompting import Prompt, PromptWriter, shuffled
from llmrec.query_prompts import QueryWriter
from llmrec.stages import inputs, run_folder
from llmrec.stages.bench_retrievers import headline
from llmrec.stages.finished import folder_of
from llmrec.stages.pairs import prompt_writer, sampled
from llmrec.stages.timing import Timing, Way, in_batches, one_by_one, time_ways

Rows = list[list[list[int]]]
"""Token ids of each user's prompts: one, or one in each order of his candidates."""


def time_ranker(name: str, folder: Path, own: Config, sequences: Sequences, bench: Bench, seed: int) -> Timing:
    """Time a tuned language model, writing of the prompts included.

    A model that picks letters answers with its first token: the time to it is the time of a user, and its tokens are those of the
    prompts, which it reads. Of one that writes queries the tokens are those it writes, and "first_token" is measured apart.

    Args:
        name: what it is called in the tables.
        folder: its run folder, of `orpo` or `sft`.
        own: the settings that made and evaluated it.
        sequences: the data.
        bench: how many users, how often.
        seed: of the users.

    Raises:
        UserError: the candidates are not those of the data, or no prompt fits its budget.
    """
    from llmrec.rankers.backbone import compile_layers, load_tuned

    model = load_tuned(inputs.base_folder(own), own.base, folder)
    writer = prompt_writer(own, load_titles(run_folder("prepare", own)))
    if own.base.compile and not isinstance(writer, QueryWriter):  # evaluate does not compile for queries either
        compile_layers(model, training=False, states=own.evaluation.orders > 1)
    users, write = _prompts(own, sequences, writer, bench, seed)
    ask = partial(_queries, model, writer, own, write) if isinstance(writer, QueryWriter) else partial(_letters, model, writer, write)
    ways = [Way("one", ask, one_by_one(len(users)), users), Way("batch", ask, in_batches(len(users), bench.ranker_batch), users)]
    if isinstance(writer, QueryWriter):
        ways.insert(0, Way("first_token", partial(ask, first=True), one_by_one(len(users)), users))
    measured = time_ways(name, ways, bench, seed)
    facts: dict[str, Any] = {
        "kind": "ranker",
        "run": f"{folder.parent.name}/{folder.name}",
        "history": own.prompt.history,
        "parameters": parameters(own, folder),
        "tokens": "written" if isinstance(writer, QueryWriter) else "read",
        **_evaluated(folder.name, folder.parent.name, own),
    }
    return Timing(facts | {"first_token": measured.facts["one"]} | measured.facts, measured.rows)


def _prompts(
    own: Config, sequences: Sequences, writer: PromptWriter | QueryWriter, bench: Bench, seed: int
) -> tuple[np.ndarray, Callable[[np.ndarray], Rows]]:
    """Users whose prompts fit, and what writes the prompts of some of them."""
    listed = pl.read_parquet(run_folder("retrieve", own) / "candidates.parquet").filter(pl.col("split") == "test")
    cases = sequences.cases("test")
    if not np.array_equal(listed["user"].to_numpy(), cases.users):
        raise UserError(f"{run_folder('retrieve', own)}/candidates.parquet has other test users than the data: make it again with --force")
    count = own.prompt.candidates
    some = sampled(np.arange(len(cases)), bench.ranker_users, seed)
    histories = [sequences.history(int(cases.users[at]), int(cases.ends[at])) for at in some]
    pools = listed[some]["items"].list.head(count).to_list()

    def write(place: int) -> list[Any]:
        orders = [shuffled(pools[place], seed, int(cases.users[some[place]]), number) for number in range(own.evaluation.orders)]
        return [writer.write(histories[place], order) for order in orders]

    fitting = np.array([place for place in range(len(some)) if all(isinstance(prompt, Prompt) for prompt in write(place))], dtype=np.int64)
    if not len(fitting):
        raise UserError("not one prompt fits the budget: raise prompt.budget")
    return cases.users[some[fitting]], lambda places: [[prompt.ids for prompt in write(fitting[place])] for place in places]


def _letters(model: Any, writer: PromptWriter, write: Callable[[np.ndarray], Rows], places: np.ndarray) -> int:
    from llmrec.rankers.orders import letter_logprobs_of_orders

    rows = write(places)
    letter_logprobs_of_orders(model, rows, writer.labels, batch=len(places) * len(rows[0]))
    return sum(len(row) for prompts in rows for row in prompts)


def _queries(
    model: Any, writer: QueryWriter, own: Config, write: Callable[[np.ndarray], Rows], places: np.ndarray, first: bool = False
) -> int:
    from llmrec.rankers.queries import beam_queries

    rows = [prompts[0] for prompts in write(places)]
    longest = 1 if first else own.prompt.title_tokens + 1
    found = beam_queries(model, rows, queries=own.queries.count, new_tokens=longest, end_ids=writer.end_ids, batch=len(places))
    return 0 if first else sum(query.tokens for queries in found for query in queries)


def parameters(own: Config, folder: Path) -> dict[str, int]:
    """Weights of the base model and its adapter: `total`, and `non_embedding` without the tables of tokens and positions."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    shape = inputs.model_shape(own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    total = sum(weight.numel() for weight in model.parameters())
    adapter = 0
    for path in folder.glob("adapter_model.safetensors"):
        with safe_open(path, "pt") as file:
            adapter = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118  # not a dict
    return {"total": total + adapter, "non_embedding": total - tables + adapter}


def _evaluated(name: str, system: str, own: Config) -> dict[str, Any]:
    """What `evaluate` found, of the same adapter: nothing where it has not been run."""
    folder = folder_of("evaluate", name, own)
    if not folder.is_dir():
        return {"metrics": {}, "users_evaluated": None}
    made = runs.read_metrics(folder)
    systems = made["catalogue"]["overall"] if "catalogue" in made else made["overall"]
    return {"metrics": {"test_masked": headline(systems[system])}, "users_evaluated": made["protocol"]["users_evaluated"]}
