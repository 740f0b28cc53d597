"""Every setting of the pipeline, by section: what recipes, `--config` files and the command line fill in.

One schema serves all commands, so that the same options mean the same thing everywhere; each stage reads, shows in
its `--help` and fingerprints only its own sections (see `llmrec.stages`). No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# ---------------------------------------------------------------- where things come from


@dataclass
class Wheel:
    """A file that travels inside a PyPI wheel; the wheel is downloaded with pip and never installed."""

    requirement: str
    """Exact requirement, e.g. `recbole==1.2.1`."""
    sha256: str
    """Checksum of the wheel file."""
    path: str
    """Folder or file inside the wheel."""


@dataclass
class Columns:
    """Names of the columns in your own csv or parquet files. Rating and timestamp may be null: not there."""

    user: str = "user"
    item: str = "item"
    rating: str | None = "rating"
    timestamp: str | None = "timestamp"
    title: str = "title"


@dataclass
class Source:
    """Where the interactions and titles come from."""

    format: Literal["ml-100k", "ml-1m", "ml-latest-small", "amazon-2023", "csv", "parquet"] = "csv"
    """The publisher's format, or csv/parquet for your own tables."""
    interactions: str | None = None
    """File name or glob of the interactions; a path for your own data. Stands for the same name with `.gz`, too."""
    items: str | None = None
    """File name or glob of the titles, likewise."""
    columns: Columns = field(default_factory=Columns)
    """Column names, for csv and parquet."""
    timestamp_unit: Literal["s", "ms"] = "s"
    """Unit of numeric timestamps since 1970, for csv and parquet; dates are understood without it."""
    urls: list[str] = field(default_factory=list)
    """Official addresses, all of them fetched, after $LLMREC_DATA and the cache have been looked into; archives are unpacked."""
    checksums: list[str] = field(default_factory=list)
    """`algorithm:hex` of each address in turn, where the publisher gives one."""
    wheel: Wheel | None = None
    """A registry copy, tried last."""
    files_of: str | None = None
    """Name of the data set whose files these are, where several recipes share them; null: this one's own."""
    licence: str | None = None
    """One line, printed when the data is fetched and kept in the cards."""


@dataclass
class Filter:
    """Which interactions stay. Applied in this order: bad rows, untitled items, duplicates, minimum rating, core."""

    on_bad_rows: Literal["error", "drop"] = "error"
    """A row that cannot be read (NaN rating, missing id): stop and name it, or drop and count."""
    untitled: Literal["error", "drop"] = "error"
    """An item with interactions but no title: stop and name it, or drop its interactions and count."""
    duplicates: Literal["first", "last", "keep"] = "first"
    """Which event of a repeated (user, item) stays."""
    minimum_rating: float | None = None
    """Drop interactions rated lower."""
    core: int = 5
    """Iterative k-core: every user and item keeps at least this many events, those of later periods counted in a temporal split, too. 0
    keeps all."""


@dataclass
class Split:
    """What is trained on, and what is asked in validation and test."""

    kind: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """leave_one_out: each user's last event is the test target, the one before it the validation target; temporal: two points in time
    for all users, training before the first, validation between them, test after the second."""
    target: Literal["last", "successive"] = "last"
    """temporal: a user is asked about his last event of a period, or about every one, each with all that came before it as history."""
    valid_quantile: float = 0.8
    """temporal: validation begins at this quantile of all timestamps."""
    test_quantile: float = 0.9
    """temporal: test begins at this quantile."""
    ties: Literal["file_order", "item_id", "random"] = "file_order"
    """Order of a user's events with equal timestamps. Ambiguous targets are counted in metrics.json."""
    minimum_events: int = 5
    """leave_one_out: users with fewer events have training events only. At least 3."""


# ---------------------------------------------------------------- retrievers


@dataclass
class Mixer:
    """The layer that mixes positions of the history; see llmrec/retrievers/mixers."""

    name: Literal["attention", "gru", "lru", "mamba", "mamba2", "hydra", "latent_mamba", "gated_mamba_attention", "hstu"] = "mamba2"
    heads: int = 2
    """attention, hstu, gated_mamba_attention: number of heads; latent_mamba: number of Mamba-2 layers side by side."""
    hidden: int = 128
    """gru, lru: width of the hidden state."""
    d_latent: int | None = None
    """latent_mamba: width of each of its layers; null is a quarter of model.dim."""
    d_state: int = 128
    """mamba, mamba2, hydra, latent_mamba, gated_mamba_attention: size of the state per channel."""
    headdim: int = 4
    """mamba2, hydra, latent_mamba: channels per head."""
    d_conv: int = 4
    """mamba and its kin: width of the convolution."""
    expand: int = 2
    """mamba and its kin: inner width over outer width."""
    chunk: int = 64
    """mamba2, hydra, latent_mamba: positions per block of the scan; speed only, the result is the same."""
    init: Literal["mamba", "mamba4rec"] = "mamba4rec"
    """mamba and its kin: how they start; mamba4rec draws every linear weight from N(0, .02), which in Mamba-1 also wipes out the small
    first steps."""
    dropout: float = 0.0
    """attention, gated_mamba_attention: on the attention weights. On a CPU anything but 0 costs the fast kernel."""
    legacy_leak: bool = False
    """gated_mamba_attention: let every position see the whole history, as the public code does. Metrics of validation and test stay
    honest, the training does not."""


@dataclass
class SequenceModel:
    """Embedding -> layers of mixer and feed-forward -> tied softmax."""

    mixer: Mixer = field(default_factory=Mixer)
    dim: int = 64
    layers: int = 1
    feed_forward: Literal["gelu", "relu", "swiglu", "gated", "none"] = "gelu"
    """gelu, relu: two linear layers; swiglu: three without bias; gated: arXiv 2504.07398's equation 11 read literally, all three as
    wide as the model; none: the mixer alone."""
    inner: int = 256
    """Width of the feed-forward layer."""
    norm: Literal["post", "pre", "none"] = "post"
    """post: after the residual sum (RecBole, Mamba4Rec); pre: before mixer and feed-forward, and at the end; none: GRU4Rec."""
    norm_kind: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    dropout: float = 0.2
    positions: bool = False
    """Learned position embeddings (SASRec)."""
    scaled: bool = False
    """Item embeddings times the root of dim before anything else (RecMamba)."""
    residual: bool = False
    """Residual around the mixer. Mamba4Rec has none when it has one layer."""
    item_bias: bool = False
    """A learned bias per item in the scores (LRURec)."""
    repeat_bias: bool = False
    """One learned bias in the scores of all items among the last max_length events: a learned mask where nobody repeats; with loss
    full_softmax."""
    temperature: float | None = None
    """Scores are cosines over this temperature (InfoNCE with loss sampled_softmax); null: plain products."""


@dataclass
class Training:
    """How a sequence model is trained."""

    max_length: int = 50
    """Events of history the model sees."""
    loss: Literal["full_softmax", "sampled_softmax", "gbce", "bce"] = "full_softmax"
    """full_softmax: cross-entropy over all items; sampled_softmax: over the target and the negatives; gbce: gSASRec's, with the same
    negatives; bce: one negative per target, as the first SASRec."""
    negatives: int = 256
    """sampled_softmax, gbce: uniform negatives, shared by all targets of a step."""
    calibration: float = 0.75
    """gbce: t of arXiv 2308.07192; 0 is plain binary cross-entropy, 1 calibrates fully."""
    batch: int = 64
    """Windows per step."""
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine ends at 0 after training.epochs."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    gradient_clip: float = 5.0
    epochs: int = 200
    """At most; early stopping ends it sooner."""
    patience: int = 10
    """Validations without a better NDCG@10 before stopping."""
    validate_every: int = 1
    """Epochs from one validation to the next."""
    windows: Literal["all", "last", "prefixes"] = "all"
    """all: each history is cut into windows of max_length, every position is a target; last: only the latest window; prefixes: random
    prefixes with one target each, for mixers that see the future of a position (hydra)."""
    prefixes_per_user: int = 4
    """prefixes: per epoch."""


@dataclass
class LightFM:
    """LightFM with the WARP loss: a retriever, and the source of the losers in preference pairs."""

    components: int = 64
    epochs: int = 30
    learning_rate: float = 0.05
    max_sampled: int = 10
    item_alpha: float = 0.0
    user_alpha: float = 0.0


@dataclass
class Retrieval:
    """Which retriever, and what it hands on."""

    kind: Literal["sequence", "lightfm", "popularity"] = "sequence"
    candidates: int = 100
    """Candidates kept per user."""
    repeats: bool = False
    """Whether a candidate may come from the user's history (listening, groceries); set by the dataset recipe."""
    keep_states: bool = False
    """Keep every user's state, so that new events cost one step each; for sequence models whose mixer has a state."""
    legacy: Literal["uniform", "popularity"] | None = None
    """Measure against 100 sampled negatives too, beside the full ranking, for tables that were made so: drawn uniformly, or as often as
    items have training events. Such numbers compare with nothing else, and do not even order models as the full ranking does."""


# ---------------------------------------------------------------- prompts and pairs


@dataclass
class Prompting:
    """How a history and a pool of candidates become a prompt."""

    template: str = "llamarec"
    """A file of prompts/ by name, or a path."""
    history: int = 20
    """At most this many titles of history (1 to 99); oldest go first when the budget is short."""
    candidates: int = 20
    """Size of the pool, 2 to 26: each candidate is a letter."""
    title_tokens: int = 32
    """A longer title is cut."""
    budget: int = 1024
    """Tokens of prompt and answer together."""
    years: Literal["keep", "drop"] = "drop"
    """Whether "(1999)" at the end of a title stays; SmolLM2 spends a token a digit on it."""
    order: Literal["shuffled", "retriever"] = "shuffled"
    """Order of the candidates when scoring: shuffled per user by seed, or the retriever's (LlamaRec). Training pools are
    always shuffled."""


@dataclass
class Pairs:
    """Which rows the ranker learns from. All of them come from the training part."""

    sft_rows: int | None = None
    """At most this many SFT rows (null: all)."""
    prefixes_per_user: int = 3
    """Training prefixes per user that become SFT rows."""
    prompts: int | None = None
    """At most this many preference prompts (null: one per user)."""
    pool: Literal["retriever", "uniform"] = "retriever"
    """Other candidates of a training pool: the retriever's own top list for that prefix, or uniform (LlamaRec)."""
    rating: bool = True
    """Rating pairs: of the last two training items the higher rated wins."""
    lightfm: Literal["none", "worst", "hardest", "sampled"] = "sampled"
    """LightFM pairs: the last training item wins against an unseen item: LightFM's worst (the paper's; the same few unpopular
    titles lose for most users), its hardest (highest scored), or one sampled from the lowest quartile, as popular as the winner."""
    losers: int = 1
    """LightFM losers per prompt."""


# ---------------------------------------------------------------- rankers


@dataclass
class Base:
    """The pretrained language model."""

    id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, or a local folder."""
    revision: str | None = None
    wheel: Wheel | None = None
    """A registry copy as GGUF file, tried when the hub does not answer."""
    licence: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the hardware computes in it, else float32."""
    quantise: Literal["none", "nf4"] = "none"
    """nf4: the frozen linear layers in 4 bits, their scales quantised too, computing in `dtype` (QLoRA, arXiv 2305.14314); needs
    bitsandbytes."""
    attention: str | None = None
    """attn_implementation of transformers; null: sdpa where the family has it."""
    compile: bool = False
    """torch.compile for the layers of attention models: faster, after half a minute of compiling in each stage (docs/tuning.md). On a CPU
    it needs a C++ compiler, and training computes attention as transformers writes it out, whatever `attention` says."""
    shape: dict[str, Any] | None = None
    """What config.json says of the model's size, for forecasts before the model is here, or for scratch."""
    scratch: bool = False
    """Begin with random weights of `shape`, drawn by seed; of the model `id` only the tokenizer is used."""


@dataclass
class Lora:
    """LoRA adapter (peft)."""

    r: int = 8
    """Rank. 0: no adapter, all weights are tuned, in float32, and saved as an ordinary model."""
    alpha: int = 32
    dropout: float = 0.05
    targets: list[str] | None = None
    """Module names; null takes the family's default (llama q_proj,v_proj; gpt2 c_attn; mamba2 in_proj)."""


@dataclass
class Tuning:
    """Optimisation of the adapter, for sft and orpo alike."""

    learning_rate: float = 1e-4
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup: int = 10
    """Steps."""
    epochs: float = 1.0
    batch: int = 4
    """Prompts per forward pass, at most."""
    accumulation: int = 2
    """Forward passes per optimiser step, which has batch x accumulation prompts however many processes share them."""
    max_tokens_per_batch: int | None = None
    """A forward pass takes as many of the step's prompts as fit in so many padded tokens, whatever batch says; null: batch decides."""
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    save_steps: int = 10
    """Optimiser steps between checkpoints; a killed run goes on from the last one."""
    eval_steps: int | None = None
    """Optimiser steps from one validation to the next: NDCG@10 of the target among the retriever's candidates. The best adapter is
    kept. null: no validation, the last adapter is kept."""
    eval_users: int = 200
    """Validation users asked, of those whose target is among the candidates; the same ones for every seed."""
    patience: int | None = None
    """Validations without a better NDCG@10 before the training stops; null: it goes on to the end."""
    report_to: str = "none"
    """Tracker of transformers' Trainer: none, tensorboard, trackio, wandb, mlflow."""


@dataclass
class Orpo(Tuning):
    """ORPO (arXiv 2403.07691): NLL of the chosen answer minus beta times log-sigmoid of the log odds ratio."""

    learning_rate: float = 5e-6
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "inverse_sqrt"
    beta: float = 0.05
    """Weight of the odds-ratio term; 0 is the control (the chosen answer's NLL alone). simpo: scale of its rewards; its authors take 2."""
    nll_on: Literal["completion", "sequence"] = "completion"
    """The NLL covers the answer, or prompt and answer as in TRL."""
    loss: Literal["orpo", "simpo", "softmax"] = "orpo"
    """orpo; simpo: the margin loss of arXiv 2405.14734; softmax: cross-entropy over the letters of the pool alone, with negatives: all.
    The latter two have no NLL."""
    negatives: int | Literal["all"] = 1
    """Losers of a winner. 1: its pair's own; k: its own and others of the pool, drawn once by seed and row; all: the pool. With more than
    1 every winner counts once, as the mean over its losers."""
    gamma: float = 0.5
    """simpo: by how much the winner's reward shall exceed the loser's."""
    start: Literal["sft", "base"] = "sft"
    """Continue the SFT adapter, or begin with a fresh one on the base model."""


# ---------------------------------------------------------------- evaluation


@dataclass
class Evaluation:
    """How the ranker is judged."""

    valid_users: int | None = None
    """At most this many validation users for the fusion weight, of those whose target is among the candidates."""
    test_users: int | None = None
    """At most this many test users, the same ones for every seed (null: all)."""
    batch: int = 32
    """Prompts per forward pass when scoring."""
    ask: Literal["all", "retrieved"] = "all"
    """retrieved: only users whose target is among the candidates are asked. No metric changes, as elsewhere every order of the candidates
    counts 0; in rankings.parquet the others keep the retriever's order."""
    orders: int = 1
    """Orders of the candidates in which each user is asked, shuffled by seed and user; an item's score is the mean of its letters'
    log-probabilities. More than one evens out what the model thinks of places and letters."""
    resamples: int = 10_000
    """Bootstrap resamples of the users behind every interval, and random exchanges behind every permutation test."""
    liked: float = 4.0
    """The lowest good rating, on the data's own scale: the ranking of targets so rated stands apart, under "preference"."""


@dataclass
class Queries:
    """How a ranker that writes titles (prompt.template gpt4rec) recommends from the whole catalogue."""

    count: int = 10
    """Queries per user, which are the beams of the search; each is as long as a title may be, prompt.title_tokens."""
    batch: int = 8
    """Prompts per forward pass, each with all its beams."""
    filter_history: bool | None = None
    """Whether items of the user's history are left out of what the queries find; null: as the retriever does (retrieval.repeats)."""
    valid_users: int = 500
    """Validation users, the same ones for every seed, on whom BM25's k1 and b are chosen by recall in the top 10, of equals by MRR."""
    k1: list[float] = field(default_factory=lambda: [0.5, 0.8, 1.2, 1.5, 2.0])
    """Values to choose from: how much more a word counts that a title repeats."""
    b: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Values to choose from: how much less a word counts in a long title, 0 to 1."""


@dataclass
class Order:
    """How a retriever is asked about histories in other orders."""

    shuffles: int = 5
    """Random orders of every history."""
    resamples: int = 10_000
    """Bootstrap resamples of the users behind every interval, and random exchanges behind every permutation test."""


@dataclass
class Bench:
    """Which finished models are timed, and how (arXiv 2408.05606, section 3.4.1)."""

    retrievers: str | None = None
    """Names of finished run folders of retrieve, separated by commas; null: all of this data; none: none."""
    rankers: str | None = None
    """Names of finished run folders of orpo, or of sft where there is no orpo of that name, likewise."""
    users: int = 1500
    """At most this many test users are timed for each retriever, sampled by seed."""
    ranker_users: int = 200
    """At most this many for each language model."""
    repeats: int = 3
    """Times that each of them is timed."""
    batch: int = 256
    """Users at once, where retrievers are timed in batches."""
    ranker_batch: int = 16
    """Users at once, where language models are."""
    samples: int = 30
    """Bootstrap samples of the users behind every interval, at least 2."""
    lengths: str | None = None
    """Lengths of synthetic histories, separated by commas, such as 50,200,1000,4000,16000: time of a user and memory of a training step
    of every sequence model at each, with random weights; null: not measured."""


@dataclass
class Config:
    """All settings of the pipeline."""

    dataset: str = "ml-100k"
    """Dataset recipe: a name of recipes/datasets or the path of a yaml file."""
    retriever: str = "2mamba4rec"
    """Retriever recipe. `sasrec.wide` is recipe sasrec, kept under the name sasrec.wide."""
    ranker: str = "llamarec-smollm2-135m"
    """Ranker recipe."""
    recipe: str = "quick"
    """How much to train: a name of recipes/orpo or the path of a yaml file."""
    variant: str | None = None
    """A name that keeps this ranker's run apart from others of the same retriever and ranker. bench: the name of its run folder; order:
    beside the retriever's."""
    seed: int = 0
    """Seed of everything random; runs with another seed than 0 carry it in their names."""
    runs: str = "runs"
    """Folder of the run folders."""
    limit_users: int | None = None
    """Use at most this many users for the language model's rows and evaluation, the same ones for every seed."""
    merged: bool = False
    """export: the whole model with the adapter in its weights, rather than the adapter alone."""
    source: Source = field(default_factory=Source)
    filter: Filter = field(default_factory=Filter)
    split: Split = field(default_factory=Split)
    retrieval: Retrieval = field(default_factory=Retrieval)
    model: SequenceModel = field(default_factory=SequenceModel)
    training: Training = field(default_factory=Training)
    lightfm: LightFM = field(default_factory=LightFM)
    base: Base = field(default_factory=Base)
    prompt: Prompting = field(default_factory=Prompting)
    pairs: Pairs = field(default_factory=Pairs)
    lora: Lora = field(default_factory=Lora)
    sft: Tuning = field(default_factory=Tuning)
    orpo: Orpo = field(default_factory=Orpo)
    evaluation: Evaluation = field(default_factory=Evaluation)
    queries: Queries = field(default_factory=Queries)
    order: Order = field(default_factory=Order)
    bench: Bench = field(default_factory=Bench)
