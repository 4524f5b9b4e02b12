"""Configurations of other programs become recipes that `distft check` passes, and nothing in them is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.api.recipe import checks, load
from distft.cli.main import main
from distft.config.recipe import Recipe
from distft.data.named_templates import CHATML
from distft.errors import RecipeError
from distft.importing.draft import Draft
from distft.importing.reading import read_foreign
from distft.importing.writing import recipe_text, settle, table

AXOLOTL = """
base_model: tiny
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
peft_use_rslora: true
chat_template: chatml
datasets:
  - {path: chats.jsonl, type: chat_template, field_messages: messages, message_field_role: role}
val_set_size: 0.05
sequence_len: 512
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
learning_rate: 2e-4
bf16: auto
flash_attention: true
gradient_checkpointing: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
deepspeed: deepspeed_configs/zero2.json
wandb_project: mine
an_option_of_next_year: 3
"""
LLAMA_FACTORY = """
model_name_or_path: tiny
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: ours
template: llama3
cutoff_len: 1024
max_samples: 1000
packing: true
overwrite_cache: true
output_dir: saves/x
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
mask_history: true
"""
TRL = """
model_name_or_path: tiny
dataset_name: chats.jsonl
use_peft: true
lora_r: 4
lora_target_modules: all-linear
learning_rate: 1.0e-4
per_device_train_batch_size: 2
max_length: 256
packing: true
report_to: none
evaluation_strategy: 'no'
torch_dtype: bfloat16
push_to_hub: true
"""
UNSLOTH = {
    "model": "tiny",
    "data": {"dataset": "chats.jsonl", "format_type": "chatml"},
    "training": {"max_seq_length": 512, "batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 60}
    | {"learning_rate": 2e-4, "load_in_4bit": True, "train_on_completions": True, "gradient_checkpointing": "unsloth"},
    "lora": {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.0, "use_loftq": False, "finetune_mlp_modules": True},
}
FILES = {
    "axolotl": ("a.yml", AXOLOTL),
    "llamafactory": ("l.yaml", LLAMA_FACTORY),
    "trl": ("t.yaml", TRL),
    "unsloth": ("u.json", json.dumps(UNSLOTH, indent="\t")),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows and a file of each program."""
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "What is 1 and 1?"}, {"role": "assistant", "content": "It is 2."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    info = {"ours": {"file_name": "../chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    for name, text in FILES.values():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def imported(path: Path, **options: Any) -> tuple[str, Draft, Recipe]:
    """Whose file it is, what was made of it, and the recipe as it is read from the file that is written."""
    program, draft = read_foreign(path, **options)
    target = path.parent / "out" / "recipe.yaml"
    target.parent.mkdir(exist_ok=True)
    settle(draft, target, checks())
    target.write_text(recipe_text(draft, path, program), encoding="utf-8")
    return program, draft, load([str(target)])


@pytest.mark.parametrize("program", FILES)
def test_every_key_is_taken_over_translated_or_listed(program: str, folder: Path) -> None:
    found, draft, recipe = imported(folder / FILES[program][0])
    assert found == program
    assert recipe.model.name == "tiny"
    assert draft.left == {}
    text = "\n".join(table(draft.notes, 100_000))
    keys = {line.split(":")[0] for line in FILES[program][1].splitlines() if ":" in line and line[0] not in " \t"}
    assert [key for key in sorted(keys) if key not in text] == []
    assert [note for note in draft.notes if note.kind == "open"] == []


def test_axolotl(folder: Path) -> None:
    _, draft, recipe = imported(folder / "a.yml", processes=2)
    assert recipe.batching.global_batch_tokens == 2 * 4 * 2 * 512
    assert recipe.batching.micro_batch_tokens == 2 * 512
    assert (recipe.strategy, recipe.data.chat_template) == ("zero2", "chatml")
    assert recipe.data.format is not None and recipe.data.format.messages == "messages"
    assert (recipe.data.validation_fraction, recipe.data.test_fraction) == (0.05, 0.0)
    assert recipe.quantization is not None and recipe.quantization.load_in_4bit
    assert recipe.lora is not None and recipe.lora["use_rslora"] and recipe.lora["target_modules"] == "all-linear"
    wanted = {"learning_rate": 2e-4, "warmup_steps": 0.1, "eval_steps": 0.125, "save_strategy": "epoch"}
    assert {key: recipe.training[key] for key in wanted} == wanted
    assert (recipe.tracking.report_to, recipe.tracking.project) == (["wandb"], "mine")
    unmatched = [note.theirs for note in draft.notes if note.kind == "unmatched"]
    assert "an_option_of_next_year: 3" in unmatched
    assert any(note.theirs.startswith("sample_packing") for note in draft.notes if note.kind == "silent")


def test_llama_factory(folder: Path) -> None:
    _, draft, recipe = imported(folder / "l.yaml")
    assert recipe.data.format is not None and recipe.data.format.messages == "messages"
    assert (recipe.data.train_on, recipe.data.max_samples) == ("last_assistant", 1000)
    assert recipe.lora is not None and recipe.lora["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.lora["lora_alpha"] == 16  # twice the rank, which they fill in
    assert recipe.training["gradient_checkpointing"] is True  # likewise
    assert any("see each other" in note.why for note in draft.notes)


def test_trl(folder: Path) -> None:
    _, draft, recipe = imported(folder / "t.yaml")
    assert recipe.lora is not None and (recipe.lora["r"], recipe.lora["lora_alpha"]) == (4, 32)
    assert (recipe.data.train_on, recipe.training["num_train_epochs"]) == ("all", 3.0)
    assert recipe.batching.global_batch_tokens == 2 * 256
    assert any(note.theirs == "push_to_hub: true" for note in draft.notes if note.kind == "unmatched")


def test_unsloth(folder: Path) -> None:
    _, _, recipe = imported(folder / "u.json")
    assert (recipe.strategy, recipe.run.seed, recipe.training["max_steps"]) == ("single", 3407, 60)
    assert recipe.lora is not None and len(recipe.lora["target_modules"]) == 7
    assert (recipe.batching.global_batch_size, recipe.data.train_on) == (8, "assistant")


def test_the_learning_rate_stays_and_the_batch_is_theirs_with_so_many_processes(folder: Path) -> None:
    sizes = [imported(folder / "u.json", processes=count)[2].batching.global_batch_size for count in (1, 8)]
    assert sizes == [8, 64]


def test_what_distft_cannot_do_is_left_out_and_listed(folder: Path) -> None:
    text = AXOLOTL.replace("adamw_bnb_8bit", "an_optimizer_of_theirs").replace("chats.jsonl", "gone.jsonl")
    (folder / "a.yml").write_text(text + "rl: grpo\n", encoding="utf-8")
    _, draft = read_foreign(folder / "a.yml")
    settle(draft, folder / "recipe.yaml", checks())
    assert draft.get("training.optim") is None
    assert any(note.theirs == "training.optim: an_optimizer_of_theirs" for note in draft.notes)
    assert {note.theirs for note in draft.notes if note.kind == "open"} >= {"rl: grpo"}
    assert draft.get("data.name") == "gone.jsonl"


def test_an_adapter_to_go_on_from_is_taken_over(folder: Path) -> None:
    (folder / "a.yml").write_text(AXOLOTL + "lora_model_dir: gone\n", encoding="utf-8")
    _, draft = read_foreign(folder / "a.yml")
    assert draft.get("adapter") == "gone"


@pytest.mark.parametrize(
    ("rl", "loss", "weight"),
    [("rl: kto\nkto_desirable_weight: 0.4\n", "kto", 0.4), ("rl: orpo\norpo_alpha: 0.3\n", "orpo", 1.0)],
)
def test_losses_over_answers_are_translated(rl: str, loss: str, weight: float, folder: Path) -> None:
    (folder / "a.yml").write_text(AXOLOTL.replace("chats.jsonl", "gone.jsonl") + rl, encoding="utf-8")
    _, draft = read_foreign(folder / "a.yml")
    assert (draft.get("objective"), draft.get("preference.loss_type")) == ("dpo", loss)
    assert draft.get("preference.desirable_weight") == (weight if loss == "kto" else None)
    assert draft.get("preference.beta") == (0.3 if loss == "orpo" else None)


def test_a_template_that_the_file_spells_out_is_written_beside_the_recipe(folder: Path) -> None:
    (folder / "t.yaml").write_text(TRL + "chat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'\n")
    _, _, recipe = imported(folder / "t.yaml")
    assert recipe.data.chat_template == str(folder / "out" / "recipe.jinja")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("- 1\n", "expected a mapping"),
        ("name: x\n", "none of the keys"),
    ],
)
def test_a_file_that_is_none_of_theirs_is_one_message(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        read_foreign(tmp_path / "x.yml")


def test_a_key_that_appears_twice_counts_as_it_does_with_them(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("base_model: a/b\nlearning_rate: 1\nlearning_rate: 2e-5\n", encoding="utf-8")
    _, draft = read_foreign(tmp_path / "x.yml")
    assert draft.get("training.learning_rate") == 2e-5
    assert any(note.theirs == "a key appears twice" for note in draft.notes)


def test_the_command_writes_a_recipe_and_no_file_over_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "a.yml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == "axolotl"
    assert load(["a"]).batching.micro_batch_tokens == 1024
    assert main(["import", "a.yml"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["import", "a.yml", "--output", "b.yaml", "--nproc", "0"]) == 2


def explained(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["import", *words, "--explain", "1"]) == 0
    return capsys.readouterr().out


def test_a_row_is_shown_as_both_train_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.yaml").write_text(TRL + f"chat_template: {json.dumps(CHATML)}\n", encoding="utf-8")
    trl = explained(["t.yaml"], capsys)
    assert "── distft: " in trl and "── trl: " in trl and "⟦" in trl
    (folder / "u.json").write_text(json.dumps({**UNSLOTH, "chat_template": "chatml"}), encoding="utf-8")
    text = explained(["u.json"], capsys)
    assert "── the same ids" in text and "It is 2." in text
    assert not (folder / "recipes").exists()
    assert main(["import", "t.yaml", "--explain", "7"]) == 2


def test_axolotls_prompt_and_dollys_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "Add 1 and 1.", "input": "", "output": "2"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (folder / "a.yml").write_text("base_model: tiny\ndatasets: [{path: rows.jsonl, type: alpaca}]\n", encoding="utf-8")
    text = explained(["a.yml"], capsys)
    assert "Below is an instruction that describes a task. Write" in text
    assert "── the ids differ from token " in text
