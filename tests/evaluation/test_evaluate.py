"""Scores against what their fields publish, and a served model that is asked for real."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
import torch
from nltk.translate.bleu_score import corpus_bleu
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sharelora_serve.cli import app
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.evaluation.scores import accuracy_scores, text_scores
from sharelora_serve.evaluation.tasks import TASKS, Question
from tests.e2e.server_process import running_server
from tests.tiny_models import write_tiny_model

WORDS = ("The", "restaurant", "Blue", "Spice", "serves", "cheap", "Italian", "food", "by", "river")
ASKED = "Intent of this bank customer's message: "


def sentences(drawn: random.Random, count: int) -> list[str]:
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(4, 12))) for _ in range(count)]


def test_bleu_is_that_of_another_library_over_lower_case_words_and_marks(seed: int) -> None:
    drawn = random.Random(seed)

    def written(text: str) -> str:
        words = [drawn.choice((word, word.upper(), word.lower())) for word in text.split()]
        return drawn.choice(("", "(")) + " ".join(words) + drawn.choice(("", ".", "!"))

    def split(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w ]", text.lower())

    references = [sentences(drawn, drawn.randint(1, 5)) for _ in range(30)]
    answers = [
        drawn.choice(given).rsplit(" ", 1)[0] + " " + drawn.choice(WORDS) for given in references
    ]
    references = [[written(text) for text in given] for given in references]
    answers = [written(text) for text in answers]
    found = text_scores(answers, references)["BLEU"].value
    expected = corpus_bleu(
        [[split(text) for text in given] for given in references],
        [split(answer) for answer in answers],
    )
    assert found == pytest.approx(100 * expected, abs=1e-6)


def test_answers_that_are_a_reference_score_highest(seed: int) -> None:
    drawn = random.Random(seed)
    references = [sentences(drawn, 3) for _ in range(20)]
    best = text_scores([given[-1] for given in references], references)
    worst = text_scores(["no such words at all here"] * 20, references)
    assert best["BLEU"].value == pytest.approx(100)
    assert best["ROUGE-L"].value == pytest.approx(100)
    assert best["chrF"].value == pytest.approx(100)
    for name, score in best.items():
        assert score.value > worst[name].value, name


def test_answers_too_short_for_an_n_gram_are_scored() -> None:
    scores = text_scores(["a cafe", ""], [["It is a cafe."], ["It is a pub by the river."]])
    assert scores["NIST"].value == 0
    assert scores["ROUGE-L"].value > 0


def test_accuracy_has_the_standard_error_of_a_share() -> None:
    score = accuracy_scores("right", [True, False, False, False])["right"]
    assert score.value == 25
    assert score.standard_error == pytest.approx(100 * (0.25 * 0.75 / 4) ** 0.5)


def test_labels_are_right_only_as_they_are() -> None:
    questions = [Question("a", ("card_arrival",)), Question("b", ("lost_card",))]
    scores = TASKS["banking77"].score(questions, ["card_arrival", "Lost card"])
    assert scores["accuracy"].value == 50


@pytest.mark.parametrize(
    ("answer", "well_formed", "right"),
    [
        ("So 1 + 1 = 2\n#### 1,002", 100, 100),
        ("#### 1002", 100, 100),
        ("#### 1003", 100, 0),
        ("It is 1002.", 0, 0),
        ("#### 1002 dollars", 0, 0),
    ],
)
def test_worked_answers_end_with_the_number(answer: str, well_formed: int, right: int) -> None:
    scores = TASKS["gsm8k"].score([Question("a", ("It is 1,002.\n#### 1,002",))], [answer])
    assert scores["well-formed"].value == well_formed
    assert scores["exact match"].value == right


def test_a_line_of_a_test_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,category\na,b\nbroken\n")
    with pytest.raises(ConfigurationError, match=r"test\.csv, line 3: has fewer columns"):
        TASKS["banking77"].read(tmp_path / "test.csv")
    (tmp_path / "test.jsonl").write_text('{"question": "a", "answer": "it is 5"}\n')
    with pytest.raises(ConfigurationError, match=r"line 1: .*does not end with #### and a number"):
        TASKS["gsm8k"].read(tmp_path / "test.jsonl")


def test_references_of_one_record_stand_together(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text('mr,ref\n"name[A]","A one"\n"name[B]","B one"\n"name[A]","A two"\n')
    questions = TASKS["e2e"].read(path)
    assert questions == [
        Question("Describe the restaurant: name[A]", ("A one", "A two")),
        Question("Describe the restaurant: name[B]", ("B one",)),
    ]
    with pytest.raises(ConfigurationError, match=r"has the columns \['mr', 'ref'\]"):
        TASKS["banking77"].read(path)


def test_a_served_model_is_asked_every_question_as_another_client_would(
    tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    model = write_tiny_model(tmp_path / "tiny", "smollm", seed)
    with running_server(
        tmp_path / "log", "--model", str(model), "--dtype", "float32", "--max-queue", "4"
    ) as server:
        texts = sentences(drawn, 12)
        with server.openai() as client:
            expected = [
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": f"{ASKED}{text}"}],
                    max_tokens=20,
                    temperature=0,
                ).choices[0].message.content
                for text in texts
            ]  # fmt: skip
        data = tmp_path / "test.csv"
        with data.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            for number, (text, answer) in enumerate(zip(texts, expected, strict=True)):
                writer.writerow([text, (answer or "").strip() if number % 3 else "other"])
        out = tmp_path / "out"
        arguments = ["evaluate", "banking77", str(data), "--model", "tiny", "--url", server.url]
        result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--concurrency", "12"])
        assert result.exit_code == 0, result.output
        refused = CliRunner().invoke(app, [*arguments[:-3], "nobody", "--url", server.url])
        (tmp_path / "empty.csv").write_text("text,category\n")
        arguments[2] = str(tmp_path / "empty.csv")
        empty = CliRunner().invoke(app, arguments)
    found = json.loads((out / "results.json").read_text())
    assert [row["answer"] for row in found["answers"]] == [
        (answer or "").strip() for answer in expected
    ]
    assert found["scores"]["accuracy"]["value"] == pytest.approx(100 * 8 / 12)
    assert "12 questions to tiny" in result.stdout
    assert (out / "report.md").read_text().strip() in result.stdout
    assert refused.exit_code == 2
    assert "nobody" in refused.stderr
    assert empty.exit_code == 2
    assert "has no questions" in empty.stderr


def test_loss_of_worked_answers_is_hugging_faces(tmp_path: Path, seed: int) -> None:
    drawn = random.Random(seed)
    model = write_tiny_model(tmp_path / "tiny", "smollm", seed)
    rows = [
        {"question": text, "answer": f"{answer}\n#### {drawn.randint(1, 9999):,}"}
        for text, answer in zip(sentences(drawn, 6), sentences(drawn, 6), strict=True)
    ]
    data, out = tmp_path / "test.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running_server(tmp_path / "log", "--model", str(model), "--dtype", "float32") as server:
        arguments = ["evaluate", "gsm8k", str(data), "--model", "tiny", "--url", server.url]
        other = CliRunner().invoke(app, arguments)
        options = ["--base", str(model), "--out", str(out), "--limit", "3"]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
    assert other.exit_code == 2
    assert "tiny is served over tiny, whose tokens the loss is of; give --base" in other.stderr
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses: list[float] = []
    for row in rows[::2]:
        question = {"role": "user", "content": row["question"]}
        prompt = tokenizer.apply_chat_template(
            [question], tokenize=False, add_generation_prompt=True
        )
        given = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([given + answer])).logits[0, len(given) - 1 : -1]
        losses += cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    scores = json.loads((out / "results.json").read_text())["scores"]
    assert scores["answer loss"]["value"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert set(scores) == {"answer loss", "well-formed", "exact match"}
