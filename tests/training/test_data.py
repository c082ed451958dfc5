"""Rows from files: what is learnt from them, and what is said of those that are wrong."""

import copy
import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sharelora_serve.errors import ConfigurationError
from sharelora_serve.training.batches import Batches, collate, in_order_of_length
from sharelora_serve.training.data import Row, Template, hold_out, read_rows
from tests.training.conftest import sentence

TEMPLATE = Template("Intent of: {text}", "{category}")


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def written(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def refusal(path: Path, tokenizer: Any, max_length: int = 512, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_rows(path, tokenizer, max_length, **options)
    assert str(path) in caught.value.message
    return caught.value.message


def test_a_conversation_is_asked_as_the_chat_endpoint_asks_it(
    tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    messages = [
        {"role": "user", "content": sentence(drawn)},
        {"role": "assistant", "content": sentence(drawn)},
        {"role": "user", "content": sentence(drawn)},
    ]
    answer = sentence(drawn)
    line = {"messages": [*messages, {"role": "assistant", "content": answer}]}
    (row,) = read_rows(written(tmp_path / "a.jsonl", line), tokenizer, 512)
    asked = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    ).input_ids
    assert list(row.prompt_ids) == asked
    assert tokenizer.decode(row.answer_ids) == answer + tokenizer.eos_token


def test_prompt_and_completion_are_taken_as_they_are(
    tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    prompt, completion = sentence(drawn), sentence(drawn)
    line = {"prompt": prompt, "completion": completion, "other": 1}
    (row,) = read_rows(written(tmp_path / "a.jsonl", "", line), tokenizer, 512)
    assert list(row.prompt_ids) == tokenizer(prompt).input_ids
    assert tokenizer.decode(row.answer_ids) == completion + tokenizer.eos_token
    assert row.line == 2


def test_a_beginning_is_put_before_prompts_and_not_before_conversations(
    tokenizer: Any, tmp_path: Path
) -> None:
    own = copy.deepcopy(tokenizer)
    first = own.bos_token
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, own.bos_token_id)]
    )
    own.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    chat = {"messages": [{"role": role, "content": "red"} for role in ("user", "assistant")]}
    plain = [{"prompt": prompt, "completion": "red"} for prompt in ("red", f"{first}red")]
    rows = read_rows(written(tmp_path / "a.jsonl", chat, *plain), own, 512)
    red = tokenizer("red").input_ids
    begins = own.bos_token_id
    assert [list(row.prompt_ids) for row in rows] == [
        red,
        [begins, *red],
        [begins, begins, *red],  # as /v1/completions has it
    ]


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    chat = {"messages": [{"role": role, "content": "red"} for role in ("user", "assistant")]}
    message = refusal(written(tmp_path / "a.jsonl", GOOD, chat), own)
    assert "line 2: the base's chat template refuses it: roles must alternate" in message


def test_csv_and_jsonl_give_the_same_rows_by_a_template(
    tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    fields = [
        {"text": f'{sentence(drawn)},\n"{sentence(drawn)}"', "category": sentence(drawn)}
        for _ in range(5)
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        writer.writerows(fields)
    from_csv = read_rows(tmp_path / "a.csv", tokenizer, 512, TEMPLATE)
    from_jsonl = read_rows(written(tmp_path / "a.jsonl", *fields), tokenizer, 512, TEMPLATE)
    assert [row.line for row in from_csv] == [2, 4, 6, 8, 10]
    assert [(row.prompt_ids, row.answer_ids) for row in from_csv] == [
        (row.prompt_ids, row.answer_ids) for row in from_jsonl
    ]
    asked = tokenizer.decode(from_csv[0].prompt_ids)
    assert f"Intent of: {fields[0]['text']}" in asked


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a"}, "neither 'messages' nor 'prompt' and 'completion', only 'prompt'"),
        ({"prompt": "a", "completion": 5}, "'completion' is int 5, expected a text"),
        ({"prompt": "a", "completion": ""}, "nothing is learnt; leave the line out"),
        ({"prompt": "", "completion": "b"}, "the prompt is empty"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "there is no answer to learn"),
        ({"messages": [{"role": "dog", "content": "a"}]}, "the role 'dog', expected system"),
        ({"messages": [{"role": "user", "content": 1}]}, "no text in 'content'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            "the answer is empty",
        ),
        ({"prompt": "a", "completion": "b c " * 400}, "more than 512, which is --max-length"),
    ],
)
def test_a_wrong_line_is_named_with_what_to_do(
    line: object, said: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    number = random.Random(seed).randrange(1234)
    path = written(tmp_path / "a.jsonl", *[GOOD] * number, line, GOOD)
    message = refusal(path, tokenizer)
    assert "1 line to mend" in message
    assert f"line {number + 1}: " in message
    assert said in message


def test_many_wrong_lines_are_counted_and_ten_are_shown(tokenizer: Any, tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "a.jsonl", *["{"] * 25), tokenizer)
    assert "25 lines to mend" in message
    assert message.count("  line ") == 10
    assert "... and 15 more" in message


def test_files_that_hold_nothing_or_are_none(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert "has no rows" in refusal(tmp_path / "empty.jsonl", tokenizer)
    assert "cannot be read" in refusal(tmp_path / "missing.jsonl", tokenizer)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "UTF-8" in refusal(tmp_path / "latin.jsonl", tokenizer)
    assert ".jsonl or .csv" in refusal(tmp_path / "a.parquet", tokenizer)
    assert "--user" in refusal(tmp_path / "a.csv", tokenizer)


def test_a_field_that_a_template_lacks(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "a", "label": "b"})
    message = refusal(path, tokenizer, template=TEMPLATE)
    assert "line 1: has no field 'category'" in message
    assert "it has 'text', 'label'" in message


def test_what_is_no_text_in_a_field_is_named_and_not_learnt(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"text": "a", "category": value} for value in ("b", None, ["c"], True, 5)]
    message = refusal(written(tmp_path / "a.jsonl", *lines), tokenizer, template=TEMPLATE)
    assert "3 lines to mend" in message
    assert "line 2: 'category' is NoneType null, expected a text or a number" in message
    path = written(tmp_path / "a.csv", "text,category", "a,b", "broken", "c,d,e")
    message = refusal(path, tokenizer, template=TEMPLATE)
    assert "2 lines to mend" in message
    assert "line 3: has not as many columns as the header" in message
    path = written(tmp_path / "a.csv", "text,category", "", "a,b", "", "broken", '"c"d,e')
    message = refusal(path, tokenizer, template=TEMPLATE)
    assert "line 5: has not as many columns as the header" in message
    assert "line 6: is not CSV (" in message


def test_a_template_reaches_into_a_field(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": {"en": "sea"}, "answers": ["x", "y"]})
    (row,) = read_rows(path, tokenizer, 512, Template("{text[en]}", "{answers[1]}"))
    assert "sea" in tokenizer.decode(row.prompt_ids)
    assert tokenizer.decode(row.answer_ids) == "y" + tokenizer.eos_token


def test_a_template_that_is_none(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(ConfigurationError, match="is no template"):
        read_rows(path, tokenizer, 512, Template("{text", "{text}"))


rows_of_any_length = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=60
).map(
    lambda lengths: [
        Row(tuple(range(prompt)), tuple(range(answer)), line)
        for line, (prompt, answer) in enumerate(lengths)
    ]
)


@given(rows=rows_of_any_length, size=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_row_comes_once_in_an_epoch_whatever_step_is_asked_for_first(
    rows: list[Row], size: int, seed: int
) -> None:
    batches = Batches(rows, size, seed)
    expected = Counter(row.prompt_ids + row.answer_ids for row in rows)
    for epoch in (1, 0):
        steps = range(epoch * batches.num_in_epoch, (epoch + 1) * batches.num_in_epoch)
        drawn = [batches[step] for step in steps]
        assert sum(batch.num_tokens for batch in drawn) == sum(row.num_tokens for row in rows)
        assert sum(int(batch.labelled.sum()) for batch in drawn) == sum(
            len(row.answer_ids) for row in rows
        )
        found: Counter[tuple[int, ...]] = Counter()
        for batch in drawn:
            for tokens, labelled in zip(batch.tokens, batch.labelled, strict=True):
                length = int(labelled.nonzero().max()) + 1
                found[tuple(tokens[:length].tolist())] += 1
        assert found == expected
    later = batches.num_in_epoch // 2
    assert Batches(rows, size, seed)[later].tokens.equal(batches[later].tokens)


@given(rows=rows_of_any_length, size=st.integers(1, 7))
def test_validation_sees_every_answer_once(rows: list[Row], size: int) -> None:
    batches = in_order_of_length(rows, size)
    assert sum(len(batch.tokens) for batch in batches) == len(rows)
    assert sum(int(batch.labelled.sum()) for batch in batches) == sum(
        len(row.answer_ids) for row in rows
    )


@given(rows=rows_of_any_length, count=st.integers(0, 20), seed=st.integers(0, 99))
def test_no_prompt_is_both_trained_on_and_held_out(rows: list[Row], count: int, seed: int) -> None:
    most_alike = max(Counter(row.prompt_ids for row in rows).values())
    assume(count <= len(rows) - most_alike)  # else nothing may be left
    trained, held = hold_out(rows, count, seed)
    assert trained
    assert sorted(row.line for row in trained + held) == [row.line for row in rows]
    assert not {row.prompt_ids for row in trained} & {row.prompt_ids for row in held}
    assert len(held) >= count


def test_holding_out_everything_is_refused() -> None:
    rows = [Row((1, 2), (3,), line) for line in range(9)]  # of one prompt, so they go together
    with pytest.raises(ConfigurationError, match="leaves none of the 9 rows"):
        hold_out(rows, 1, 0)


def test_only_answers_are_labelled() -> None:
    batch = collate([Row((1, 2, 3), (4, 5), 1), Row((6,), (7,), 2)])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.labelled.tolist() == [[False] * 3 + [True] * 2, [False, True, *[False] * 3]]
