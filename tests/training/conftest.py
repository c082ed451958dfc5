"""A tiny random base and a data file to learn from, both new in every run."""

import json
import random
from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_model

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "river", "stone")


def sentence(drawn: random.Random, most: int = 8) -> str:
    return " ".join(drawn.choices(WORDS, k=drawn.randint(1, most)))


def write_jsonl(path: Path, seed: int, count: int = 40) -> Path:
    """Prompts and completions, and conversations, in turn; no two ask the same."""
    drawn = random.Random(seed)
    questions: list[str] = []
    while len(questions) < count:
        if (question := sentence(drawn)) not in questions:
            questions.append(question)
    lines: list[dict[str, object]] = []
    for number, question in enumerate(questions):
        answer = sentence(drawn, most=4)
        if number % 2:
            lines.append({"prompt": question, "completion": answer})
        else:
            user = {"role": "user", "content": question}
            lines.append({"messages": [user, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "smollm", seed)


@pytest.fixture
def data(tmp_path: Path, seed: int) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", seed)
