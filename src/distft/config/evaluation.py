"""The recipe's `evaluation` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distft.config.section import DType, Section

TaskName = Literal["perplexity", "imdb", "lm_eval", "mt_bench", "alpaca"]
TASKS: dict[TaskName, str] = {
    "perplexity": "loss and perplexity on the held-out split",
    "imdb": "classification of reviews: accuracy, precision, recall, F1",
    "lm_eval": "benchmarks of lm-evaluation-harness (MMLU, ARC and GSM8K by default)",
    "mt_bench": "two-turn questions, graded by a judge",
    "alpaca": "answers compared with a reference's by a judge",
}
"""What each task measures, for `distft evaluate --help`. Their code is in `distft/evaluation/tasks/`, which says how to add one."""


class Imdb(Section):
    """Classification of reviews by the words that stand for their classes."""

    path: str | None = None
    """Local file or folder of reviews with classes. null: the recipe's held-out rows where its data are reviews, else IMDB's test
    split on the hub."""
    split: str = "test"
    """Split of the hub's IMDB."""
    text: str = "text"
    """Column of the reviews in `path`, or on the hub."""
    label: str = "label"
    """Column of the class numbers, 0 … n-1, in `path`, or on the hub."""
    subset: int | None = Field(None, ge=1)
    """Use this many rows, drawn by evaluation.seed; all where null."""
    balanced: bool = True
    """Draw as many rows of every class (of `subset`, or of the rarest class); off: as they come."""
    label_words: list[str] | None = None
    """The word that stands for each class number; null for those of data.format."""
    positive: int = Field(1, ge=0)
    """The class that precision, recall and F1 are of."""
    methods: list[Literal["logprob", "generation"]] = Field(["logprob", "generation"], min_length=1)
    """`logprob` takes the word that is likeliest after the prompt; `generation` lets the model write and reads the word, and an answer
    without one is wrong."""
    max_new_tokens: int = Field(8, ge=1)
    """Tokens that `generation` lets the model write."""
    max_length: int | None = Field(None, ge=16)
    """Tokens of prompt and word; a longer review is cut as in training. null: training.max_length."""


class LmEval(Section):
    """Benchmarks of lm-evaluation-harness (`pip install 'distft[eval]'`)."""

    tasks: list[str] = ["mmlu", "arc_easy", "arc_challenge", "gsm8k"]
    """Tasks and groups by lm-eval's names."""
    include_path: str | None = None
    """Folder of task files of your own."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Take the first so many documents of every task; all where null."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before every document; null for as many as each task says."""
    batch_size: int = Field(8, ge=1)
    """Requests that a device takes at once, padded."""
    max_length: int | None = Field(None, ge=16)
    """Tokens that the model sees of a request; null for all that it can."""


class MtBench(Section):
    """Two turns for each question, each answer judged by itself."""

    questions: str | None = None
    """File of questions in MT-Bench's format (JSON lines: question_id, category, turns)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Take the first so many questions; all where null."""


class Alpaca(Section):
    """Answers beside those of a reference, judged as judge.mode says."""

    path: str | None = None
    """File of instructions with reference outputs in AlpacaEval's format (JSON, or JSON lines: instruction, output)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Take the first so many instructions; all where null."""


class Generation(Section):
    """How answers are written."""

    max_new_tokens: int = Field(512, ge=1)
    """Tokens that an answer may have."""
    batch_tokens: int = Field(16_384, ge=1)
    """Tokens, of prompts and of what may be written, that a device takes at once; prompts of one length go together."""
    temperature: float | None = Field(None, ge=0)
    """0 takes the likeliest token each time. null: what each task defines (MT-Bench by category), else 0."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Where sampled: draw from the likeliest tokens that have this probability together."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto` takes vLLM where it is installed, a GPU is there, and the base is not quantised, else transformers' generate. vLLM loads the
    base a second time."""


class Judge(Section):
    """The model that judges, and how it is asked."""

    model: str = "prometheus-eval/prometheus-7b-v2.0"
    """Hub id or folder of a causal language model (`tiny` for the embedded one); with `endpoint`, the name that the server knows."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    endpoint: str | None = Field(None, pattern=r"^https?://\S+$")
    """Base URL of an OpenAI-compatible server, `http://127.0.0.1:8000/v1` say; null: the model is loaded here."""
    mode: Literal["absolute", "pairwise"] = "absolute"
    """How a pair is judged: `absolute` grades each answer by itself, and the higher grade wins; `pairwise` asks which is better, once in each
    order. The two are different figures. MT-Bench's answers are graded in both modes."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the first attempt; 0 takes the likeliest token each time."""
    retry_temperature: float = Field(0.7, gt=0)
    """Sampling temperature, at the least, of the attempts after it: at 0 another seed would give the same text."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Where sampled: draw from the likeliest tokens that have this probability together."""
    max_new_tokens: int = Field(512, ge=1)
    """Tokens that a judgement may have."""
    attempts: int = Field(3, ge=1)
    """How often a judgement is asked for until it can be parsed; after that it counts as unparsed."""
    load_in_4bit: bool = False
    """Load a local judge in 4 bits."""
    dtype: DType = "bfloat16"
    """Type of a local judge's weights, or of their products in 4 bits."""
    rubric: str | None = None
    """Local file with a rubric of your own, plain text with a line for each grade of 1 to 5; null: distft's."""
    api_key_env: str = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """With `endpoint`: name of the environment variable that holds the key; none is sent where it is not set. Never the key itself."""
    concurrency: int = Field(8, ge=1)
    """With `endpoint`: requests under way at once, over all processes."""
    timeout_s: float = Field(300.0, gt=0)
    """With `endpoint`: seconds to wait for an answer."""
    retries: int = Field(6, ge=0)
    """With `endpoint`: how often a request is sent again that was refused for load (429), failed on the server (5xx) or got no
    connection, after 1, 2, 4, … seconds (60 at the most), or what the server asks for."""


def _judge(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Evaluation(Section):
    """The held-out split before and after training, and the tasks of `distft evaluate`."""

    before_and_after: bool = True
    """Measure loss and perplexity on the held-out split before and after training."""
    max_samples: int | None = Field(None, ge=1)
    """Use at most this many samples of the validation and of the held-out split."""
    tasks: list[TaskName] = []
    """What `distft evaluate` measures, base and adapter side by side; `distft compare` does so after each run where tasks stand here.
    None named: `distft evaluate` takes perplexity."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the subsets, the bootstrap and the sampling."""
    batch_tokens: int = Field(8_192, ge=1)
    """Tokens, padding included, that a device scores at once."""
    imdb: Imdb = Imdb()
    """Classification of reviews."""
    lm_eval: LmEval = LmEval()
    """Academic benchmarks."""
    mt_bench: MtBench = MtBench()
    """Two-turn questions."""
    alpaca: Alpaca = Alpaca()
    """Answers beside a reference's."""
    generation: Generation = Generation()
    """How answers are written."""
    judge: Annotated[Judge, BeforeValidator(_judge, json_schema_input_type=Judge | str)] = Judge()
    """Who judges: a hub id or folder alone, or a mapping."""
