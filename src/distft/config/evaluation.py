"""The recipe's `evaluation` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.config import JsonDict

from distft.config.schema import SAMPLES, SECONDS, TOKENS, DType, Section

TaskName = Literal["perplexity", "imdb", "classification", "generation", "lm_eval", "mt_bench", "alpaca"]
TASKS: dict[TaskName, str] = {
    "perplexity": "loss and perplexity on the held-out split",
    "imdb": "classification of reviews: accuracy, precision, recall, F1",
    "classification": "your own texts with classes: accuracy and F1, also by group",
    "generation": "your own prompts with references: exact match, ROUGE, chrF, BLEU",
    "lm_eval": "benchmarks of lm-evaluation-harness (MMLU, ARC and GSM8K by default)",
    "mt_bench": "two-turn questions, graded by a judge",
    "alpaca": "answers compared with a reference's by a judge",
}
"""What each task measures, for `distft evaluate --help`. To add a task, see `distft/evaluation/tasks/__init__.py`."""

_QUESTIONS: JsonDict = {"unit": "questions"}
_REQUESTS: JsonDict = {"unit": "requests"}


class Labels(Section):
    """Texts with classes, each of which has a word that the model answers."""

    path: str | None = None
    text: str = "text"
    label: str = "label"
    subset: int | None = Field(None, ge=1, json_schema_extra=SAMPLES)
    """Use this many rows, drawn with evaluation.seed; null for all."""
    balanced: bool = False
    """Use equally many rows of every class; `false` draws them as they come."""
    label_words: list[str] | None = None
    methods: list[Literal["logprob", "generation"]] = Field(["logprob", "generation"], min_length=1)
    """`logprob` predicts the label word with the highest likelihood after the prompt; `generation` lets the model
    write and looks for a label word, and an answer without one is wrong."""
    max_new_tokens: int = Field(8, ge=1, json_schema_extra=TOKENS)
    """Longest answer in `generation`."""
    max_length: int | None = Field(None, ge=16, json_schema_extra=TOKENS)
    """Longest prompt with its label word; longer texts are truncated as in training. null: training.max_length."""


class Imdb(Labels):
    """Classification of reviews by label words."""

    path: str | None = None
    """Local file or folder of labelled reviews. null: the recipe's held-out split if its data are reviews, otherwise
    IMDB's test split on the hub."""
    split: str = "test"
    """Split of IMDB on the hub."""
    text: str = "text"
    """Column of the reviews, in `path` or on the hub."""
    label: str = "label"
    """Column of the class numbers, 0 … n-1, in `path` or on the hub."""
    balanced: bool = True
    """Use equally many reviews of every class; `false` draws them as they come."""
    label_words: list[str] | None = None
    """The word for each class number; null for data.format.label_words."""
    positive: int = Field(1, ge=0)
    """Class number that counts as positive in precision, recall and F1."""


class Classification(Labels):
    """Classification of your own texts, in any language and with any number of classes."""

    path: str | None = None
    """File or folder of texts with classes, or `tiny_languages_test`, which ships with distft."""
    validation: str | None = None
    """Another such file, which evaluations during training classify, for training.metric_for_best_model:
    classification_accuracy."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the classes: label words, or numbers 0 … n-1 of `label_words`."""
    label_words: list[str] | None = None
    """The word for each class number; null for the words in the file, sorted."""
    prompt: str = "{text}"
    """The question to ask the model. `{text}` is replaced with the text. The prompt is formatted with the template that
    evaluation.generation.template names."""
    group: str | None = None
    """Column, such as a language, for each of whose values the accuracy is also given."""
    positive: str | None = None
    """Label word of the class of precision, recall and F1; null: accuracy and macro F1 alone."""


class LmEval(Section):
    """Benchmarks of lm-evaluation-harness (`pip install 'distft[eval]'`)."""

    tasks: list[str] = ["mmlu", "arc_easy", "arc_challenge", "gsm8k"]
    """Tasks and task groups by their lm-eval names."""
    include_path: str | None = None
    """Folder with your own task files."""
    limit: Annotated[int, Field(ge=1)] | None = Field(None, json_schema_extra=SAMPLES)
    """Use only the first documents of each task; null for all."""
    num_fewshot: int | None = Field(None, ge=0, json_schema_extra={"unit": "examples"})
    """Examples before each document; null for the task's own number."""
    batch_size: int = Field(8, ge=1, json_schema_extra=_REQUESTS)
    """Requests that a device processes at once, padded."""
    max_length: int | None = Field(None, ge=16, json_schema_extra=TOKENS)
    """Longest context; null for the model's own limit."""


class MtBench(Section):
    """Two-turn questions whose answers are graded one by one."""

    questions: str | None = None
    """File of questions in MT-Bench's format (JSON Lines: question_id, category, turns)."""
    limit: Annotated[int, Field(ge=1)] | None = Field(None, json_schema_extra=_QUESTIONS)
    """Use only the first questions; null for all."""


class Alpaca(Section):
    """Answers compared with those of a reference, judged as judge.mode says."""

    path: str | None = None
    """File of instructions with reference outputs in AlpacaEval's format (JSON or JSON Lines: instruction, output)."""
    limit: Annotated[int, Field(ge=1)] | None = Field(None, json_schema_extra={"unit": "instructions"})
    """Use only the first instructions; null for all."""


class Generation(Section):
    """How the evaluated model writes answers, and the file of the task `generation`."""

    path: str | None = None
    """File of prompts with references for the task `generation`, or `tiny_summaries_test`, which ships with distft."""
    reference: str | None = None
    """Column of the references, each a text or a list of texts. null: `reference`, `references`, `response`,
    `completion`, `output` or `answer`, whichever comes first, otherwise the last message of the conversation."""
    metrics: list[Literal["exact_match", "rouge1", "rouge2", "rougeL", "chrf", "bleu"]] = Field(
        ["exact_match", "rouge1", "rouge2", "rougeL", "chrf", "bleu"], min_length=1
    )
    """What the task `generation` measures."""
    bleu_tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """How sacrebleu splits texts into words for BLEU: `zh` for Chinese, `char` for other scripts without spaces."""
    judged: bool = False
    """Have evaluation.judge grade the answers of the task `generation` as well, given the first reference."""
    limit: Annotated[int, Field(ge=1)] | None = Field(None, json_schema_extra={"unit": "prompts"})
    """Use only the first prompts of the file; null for all."""

    max_new_tokens: int = Field(512, ge=1, json_schema_extra=TOKENS)
    """Longest answer."""
    batch_tokens: int = Field(16_384, ge=1, json_schema_extra=TOKENS)
    """Tokens, prompts and longest answers together, that a device processes at once; a batch holds prompts of one
    length."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature; 0 is greedy. null: what the task defines (MT-Bench: per category), otherwise 0."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to this."""
    template: Literal["auto", "chat", "instruction", "plain"] = "auto"
    """How a question becomes a prompt: `chat` is the tokenizer's chat template, `instruction` Dolly's, `plain` none.
    `auto` takes the one that the run was trained with or, if that is not known, the chat template if there is one."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto` uses vLLM if it is installed, there is a GPU and the base is not quantised; otherwise generate() of
    transformers. vLLM loads the base a second time."""


class Judge(Section):
    """The model that judges, and how it is asked."""

    model: str = "prometheus-eval/prometheus-7b-v2.0"
    """Hub ID or folder of a causal language model (`tiny` for the embedded one); with `endpoint`, the server's name
    for the model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null for the default branch."""
    endpoint: str | None = Field(None, pattern=r"^https?://\S+$")
    """Base URL of an OpenAI-compatible server, such as `http://127.0.0.1:8000/v1`; null loads the model locally."""
    mode: Literal["absolute", "pairwise"] = "absolute"
    """How two answers are compared: `absolute` grades each by itself, and the higher grade wins; `pairwise` asks
    which is better, once in each order. The two measure different things. MT-Bench's answers are graded in both
    modes."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the first attempt; 0 is greedy."""
    retry_temperature: float = Field(0.7, gt=0)
    """Minimum sampling temperature of later attempts: at 0, another seed would produce the same text."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to this."""
    max_new_tokens: int = Field(512, ge=1, json_schema_extra=TOKENS)
    """Longest judgement."""
    attempts: int = Field(3, ge=1)
    """How often to ask for a judgement until one can be parsed; after that it counts as unparsed."""
    load_in_4bit: bool = False
    """Load a local judge in 4 bits."""
    dtype: DType = "bfloat16"
    """Data type of a local judge's weights or, in 4 bits, of its matrix products."""
    rubric: str | None = None
    """Local file with your own rubric: plain text with one line per grade from 1 to 5. null: distft's."""
    api_key_env: str = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """With `endpoint`: name of the environment variable that holds the API key. If it is unset, no key is sent. Never
    the key itself."""
    concurrency: int = Field(8, ge=1, json_schema_extra=_REQUESTS)
    """With `endpoint`: concurrent requests over all processes."""
    timeout_s: float = Field(300.0, gt=0, json_schema_extra=SECONDS)
    """With `endpoint`: how long to wait for an answer."""
    retries: int = Field(6, ge=0)
    """With `endpoint`: how often to resend a request after rate limiting (429), a server error (5xx) or a failed
    connection. Waits 1, 2, 4, … seconds, at most 60, or as long as the server asks."""


OF_TASK = ("path", "reference", "metrics", "bleu_tokenize", "judged", "limit")
"""Keys of `generation` that concern the task of that name alone."""


def _judge(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Samples(Section):
    """Prompts of the held-out split that the model answers while it is trained."""

    number: int = Field(0, ge=0, json_schema_extra={"unit": "prompts"})
    """The first prompts of the held-out split; 0 for none."""
    each_evaluation: bool = False
    """Answer them in each evaluation during training as well (training.eval_strategy)."""
    max_new_tokens: int = Field(64, ge=1, json_schema_extra=TOKENS)
    """Longest answer."""


def _samples(value: Any) -> Any:
    return {"number": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Evaluation(Section):
    """The held-out split before and after training, and the tasks of `distft evaluate`."""

    before_and_after: bool = True
    """Measure loss and perplexity on the held-out split before and after training."""
    samples: Annotated[Samples, BeforeValidator(_samples, json_schema_input_type=Samples | int)] = Samples()
    """Prompts of the held-out split to answer before and after training: their number alone, or a mapping."""
    max_samples: int | None = Field(None, ge=1, json_schema_extra=SAMPLES)
    """Use at most this many samples of the validation split and of the held-out split; null for all."""
    tasks: list[TaskName] = []
    """Tasks of `distft evaluate`, which measures base and adapter; [] for perplexity. `distft compare` runs them
    after each training run."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)
    """Name for this set of results, which is kept next to others as `TASK@NAME`. null: results on the run's own data
    have no name, those on other data that of the data."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of subsets, bootstrap and sampling."""
    batch_tokens: int = Field(8_192, ge=1, json_schema_extra=TOKENS)
    """Tokens, with padding, that a device scores at once."""
    imdb: Imdb = Imdb()
    """Classification of reviews by label words."""
    classification: Classification = Classification()
    """Classification of your own texts."""
    lm_eval: LmEval = LmEval()
    """Benchmarks of lm-evaluation-harness."""
    mt_bench: MtBench = MtBench()
    """Two-turn questions, graded."""
    alpaca: Alpaca = Alpaca()
    """Answers compared with a reference's."""
    generation: Generation = Generation()
    """How the evaluated model writes answers."""
    judge: Annotated[Judge, BeforeValidator(_judge, json_schema_input_type=Judge | str)] = Judge()
    """The judge: a hub ID or folder alone, or a mapping."""
