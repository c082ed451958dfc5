"""The data sets: what is asked of each row, what is expected, and how answers are scored."""

import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import AutoTokenizer

from sharelora_serve.errors import ConfigurationError
from sharelora_serve.evaluation.scores import Scores, accuracy_scores, text_scores
from sharelora_serve.models.source import base_folder
from sharelora_serve.training.data import Row, Template, read_rows

_FINAL_ANSWER = re.compile(r"#### (-?[\d,]+(?:\.\d+)?)\s*$")

_E2E = Template("Describe the restaurant: {mr}", "{ref}")
_BANKING77 = Template("Intent of this bank customer's message: {text}", "{category}")
_GSM8K = Template("{question}", "{answer}")

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked in one user message, and the right answers to it."""

    text: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A data set.

    template    what is asked of a row, and what is the right answer
    max_tokens  of an answer; all right ones but two of GSM8K's have fewer
    read        questions from its test file, as its authors publish it
    score       answers, in the order of the questions
    """

    template: Template
    max_tokens: int
    read: Callable[[Path], list[Question]]
    score: Callable[[Sequence[Question], Sequence[str]], Scores]


def spread(items: list[Item], limit: int | None) -> list[Item]:
    """As many items, evenly over all of them, since test files are sorted; None for all."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _rows(path: Path, columns: tuple[str, str]) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or []):
                raise ConfigurationError(
                    f"{path} has the columns {reader.fieldnames}, expected {', '.join(columns)}"
                )
            found = []
            for row in reader:
                if any(row[name] is None for name in columns):
                    raise ConfigurationError(
                        f"{path}, line {reader.line_num}: has fewer columns than the header"
                    )
                found.append((row[columns[0]], row[columns[1]]))
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def _read_e2e(path: Path) -> list[Question]:
    """One question for each meaning representation, with all of its references."""
    references: dict[str, list[str]] = {}
    for record, text in _rows(path, ("mr", "ref")):
        references.setdefault(record, []).append(text)
    return [
        Question(_E2E.user.format(mr=record), tuple(texts)) for record, texts in references.items()
    ]


def _read_banking77(path: Path) -> list[Question]:
    return [
        Question(_BANKING77.user.format(text=text), (label,))
        for text, label in _rows(path, ("text", "category"))
    ]


def _read_gsm8k(path: Path) -> list[Question]:
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if _FINAL_ANSWER.search(row["answer"]) is None:
                raise ValueError("the answer does not end with #### and a number")
            questions.append(Question(row["question"], (row["answer"],)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path}, line {number}: expected an object with question and answer ({error!r})"
            ) from error
    return questions


def read_worked_answers(path: Path, base: str | None) -> list[Row]:
    """GSM8K's questions with their worked answers, in the tokens of a base."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder(base))
    return read_rows(path, tokenizer, sys.maxsize, _GSM8K)


def _score_texts(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    return text_scores(answers, [question.references for question in questions])


def _score_labels(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    right = [
        answer == question.references[0]
        for question, answer in zip(questions, answers, strict=True)
    ]
    return accuracy_scores("accuracy", right)


def _score_worked(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    found = [_FINAL_ANSWER.search(answer) for answer in answers]
    right = []
    for question, answer in zip(questions, found, strict=True):
        expected = _FINAL_ANSWER.search(question.references[0])
        assert expected is not None, "a reference ends with its answer"
        right.append(
            answer is not None and answer[1].replace(",", "") == expected[1].replace(",", "")
        )
    return accuracy_scores("well-formed", [each is not None for each in found]) | accuracy_scores(
        "exact match", right
    )


TASKS = {
    "e2e": Task(_E2E, max_tokens=100, read=_read_e2e, score=_score_texts),
    "banking77": Task(_BANKING77, max_tokens=20, read=_read_banking77, score=_score_labels),
    "gsm8k": Task(_GSM8K, max_tokens=400, read=_read_gsm8k, score=_score_worked),
}
