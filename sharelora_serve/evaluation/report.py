"""What an evaluation found: JSON with every answer, Markdown for people."""

import json
from collections.abc import Sequence
from pathlib import Path

from sharelora_serve.evaluation.scores import Scores
from sharelora_serve.evaluation.tasks import Question


def as_markdown(task: str, model: str, num_questions: int, scores: Scores) -> str:
    """One line for each score; a share of right answers with its standard error."""
    lines = [f"{task}, {num_questions:,} questions to {model}", "", "| | |", "| --- | ---: |"]
    for name, score in scores.items():
        error = "" if score.standard_error is None else f" ± {score.standard_error:.2f}"
        lines.append(f"| {name} | {score.value:.2f}{error} |")
    return "\n".join(lines)


def write_report(
    folder: Path,
    task: str,
    model: str,
    questions: Sequence[Question],
    answers: Sequence[str],
    scores: Scores,
) -> None:
    """Write results.json and report.md into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "task": task,
        "model": model,
        "scores": {
            name: {"value": score.value, "standard_error": score.standard_error}
            for name, score in scores.items()
        },
        "answers": [
            {"question": question.text, "references": question.references, "answer": answer}
            for question, answer in zip(questions, answers, strict=True)
        ],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    text = as_markdown(task, model, len(questions), scores)
    (folder / "report.md").write_text(text + "\n")
