"""A run on chats, and what `generate` makes of it: the prompt gets the template, once, and the answer ends where a turn does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

import atoll
from atoll.commands import generate as command
from atoll.commands.merge import merge
from atoll.commands.train import example_prompt
from atoll.errors import BadValueError

from tests.conftest import random_model
from tests.run_files import write_run
from tests.tasks.letters import letters_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
PLAIN = {"prompt": "hi", "completion": "yo"}
QUESTION = "<s><|user|>hi<|system|><|assistant|>"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What generation is asked: prompts as text, and what ends an answer."""
    asked = list[tuple[str, str]]()

    def note(model: object, tokenizer: object, prompts: list[list[int]], *, closing: str, **_: object) -> list[str]:
        asked.extend((letters_tokenizer().decode(prompt), closing) for prompt in prompts)
        return [""]

    monkeypatch.setattr(command, "generate_texts", note)
    return asked


def a_run(folder: Path, row: dict[str, object], **data: object) -> atoll.RunResult:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>{{ loud }}{% endif %}"
    )
    tokenizer.save_pretrained(folder / "base")
    random_model("llama").save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return atoll.train(write_run(folder, {"run": {"rounds": 1}, "data": {"eval": None, "max_length": 32, **data}}, edges={}))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("hi", QUESTION), (QUESTION, QUESTION), (QUESTION.removeprefix("<s>"), QUESTION), ('[{"role": "user", "content": "hi"}]', QUESTION),
        ('{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"loud": "!"}}', QUESTION + "!"),
        ("[1]", QUESTION.replace("hi", "[1]")), ("{", QUESTION.replace("hi", "{")),
        ('[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]', "<s><|system|>s<|system|>" + QUESTION[3:]),
    ],
)  # fmt: skip
def test_a_run_on_chats_answers_in_its_template(tmp_path: Path, given: list[tuple[str, str]], prompt: str, wanted: str) -> None:
    atoll.generate(a_run(tmp_path, CHAT).run_dir, prompt)
    assert given == [(wanted, "<|system|>")]


def test_a_run_on_prompts_goes_on_from_the_prompt(tmp_path: Path, given: list[tuple[str, str]]) -> None:
    run = a_run(tmp_path, PLAIN).run_dir
    for prompt in ("hi", "<s>hi"):
        atoll.generate(run, prompt)
    assert given == [("<s>hi", "")] * 2
    with pytest.raises(BadValueError, match="no text"):
        atoll.generate(run, "caf\udce9")


def test_variables_of_the_template_hold_in_training_and_after_it(tmp_path: Path, given: list[tuple[str, str]]) -> None:
    talk = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "!yo"}]}
    run = a_run(tmp_path, talk, chat_template_kwargs='{"loud": "!"}')
    atoll.generate(run.run_dir, "hi")
    assert given == [(QUESTION + "!", "<|system|>")]
    for wrong in ("{", "[1]", '{"tools": []}'):
        with pytest.raises(BadValueError, match="object of variables"):
            a_run(tmp_path / "wrong", CHAT, chat_template_kwargs=wrong)


@pytest.mark.parametrize(("row", "ends"), [(CHAT, [2, 5]), (PLAIN, 2)])
def test_other_libraries_end_where_the_chats_did(tmp_path: Path, row: dict[str, object], ends: object) -> None:
    run = a_run(tmp_path, row).run_dir
    assert GenerationConfig.from_pretrained(merge(run, out=tmp_path / "merged")).eos_token_id == ends
    assert atoll.load(run).generation_config.eos_token_id == ends


@pytest.mark.parametrize(
    ("row", "example"), [(CHAT, "hi"), (PLAIN, "hi"), ({"messages": []}, "..."), ({"prompt": None, "completion": "yo"}, "...")]
)
def test_what_to_try_next_is_a_question_of_the_run(tmp_path: Path, row: dict[str, object], example: str) -> None:
    """Also where the first held-out row is one that was skipped."""
    good = CHAT if "messages" in row else PLAIN
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
    assert example_prompt(a_run(tmp_path, good, eval="eval.jsonl", on_bad_row="skip").run_dir) == example
