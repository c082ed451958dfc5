"""The command train: runs that stop and go on, what they write, and who can load it."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoTokenizer, get_scheduler
from typer.testing import CliRunner, Result

from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.cli import app
from sharelora_serve.config import ServeConfig
from sharelora_serve.models.config import load_model_config
from sharelora_serve.training.batches import collate
from sharelora_serve.training.counts import Method
from sharelora_serve.training.data import Row, read_rows
from sharelora_serve.training.factors import add_factors
from sharelora_serve.training.settings import Schedule, TrainSettings
from sharelora_serve.training.trainer import Trainer
from tests.e2e.server_process import running_server
from tests.golden.reference import load_reference, reference_with_peft
from tests.golden.serving import Case, assert_equal, running_engine, serve_together
from tests.tiny_models import ARCHITECTURES, write_tiny_model
from tests.training.conftest import WORDS, write_jsonl

FORMS = {
    "lora": ("--share", "none"),
    "share-a": ("--share", "A"),
    "share-b": ("--share", "B"),
    "share-ab": ("--share", "AB", "--rslora"),
    "share-qkv": ("--share", "A", "--share-qkv", "--modules", "q,k,v,down_proj"),
    "share-only": ("--share", "A", "--share-only", "q,v"),
    "frozen": ("--freeze-a-from", "7"),
}
SHORT = ("--rank", "4", "--batch-size", "4", "--hold-out", "5", "--learning-rate", "1e-2")


def train(data: Path, output: Path, model: Path, *options: str) -> Result:
    """Run to the end, in this process."""
    arguments = ["train", str(data), str(output), "--model", str(model), *SHORT, *options]
    return CliRunner().invoke(app, arguments)


def trained(data: Path, output: Path, model: Path, *options: str) -> str:
    """What a run says that succeeds, byte for byte: a model may well answer a carriage return."""
    result = train(data, output, model, *options)
    assert result.exit_code == 0, result.output
    return result.output_bytes.decode()


@pytest.mark.parametrize("form", FORMS)
def test_peft_answers_what_is_served_in_float32(
    form: str, data: Path, tmp_path: Path, model_folder: Path, seed: int
) -> None:
    adapters = tmp_path / "adapters"
    options = (*FORMS[form], "--steps", "12", "--dtype", "float32", "--seed", str(seed))
    said = trained(data, adapters / form, model_folder, *options)
    assert "step 12/12" in said
    plain = tmp_path / "plain"
    arguments = ["adapters", "export", str(adapters / form), str(plain)]
    result = CliRunner().invoke(app, [*arguments, "--model", str(model_folder)])
    assert result.exit_code == 0, result.output
    config = json.loads((plain / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    drawn = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = [tokenizer(" ".join(drawn.choices(WORDS, k=count))).input_ids for count in (3, 20)]
    cases = [Case(form, prompt, 24) for prompt in prompts]
    config = ServeConfig(
        model=str(model_folder), adapters=adapters, dtype="float32", device="cpu", threads=2
    )
    with running_engine(config) as loaded:
        answers = serve_together(loaded, cases)
        base = serve_together(loaded, [Case(None, prompt, 24) for prompt in prompts])
    for case, answer in zip(cases, answers, strict=True):
        expected = reference_with_peft(model_folder, plain, case.prompt_ids, case.num_tokens)
        assert_equal(case, answer, expected)
    assert [answer.token_ids for answer in answers] != [answer.token_ids for answer in base]


def start(data: Path, output: Path, model: Path, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sharelora_serve.cli", "train", str(data), str(output)]
    return subprocess.Popen(
        [*command, "--model", str(model), *SHORT, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """In this process too, as --threads 1 leaves it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("number", "save_every"),
    [(signal.SIGKILL, "5"), (signal.SIGTERM, "1000"), (signal.SIGINT, "1000")],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(
    number: signal.Signals,
    save_every: str,
    data: Path,
    tmp_path: Path,
    model_folder: Path,
    seed: int,
) -> None:
    options = ("--steps", "60", "--dropout", "0.1", "--seed", str(seed))
    options = (*options, "--save-every", save_every, "--threads", "1", "--dtype", "float32")
    stopped = tmp_path / "stopped"
    checkpoint = tmp_path / ".stopped.checkpoint" / "checkpoint.safetensors"
    with start(data, stopped, model_folder, *options) as process:
        assert process.stderr is not None
        assert any(line.startswith(b"step 20/") for line in process.stderr), "it ended before"
        process.send_signal(number)
        process.wait()
    assert not stopped.exists(), "it had ended before it could be stopped"
    if number != signal.SIGKILL:
        assert process.returncode == 130
    others = train(data, stopped, model_folder, *options, "--resume", "--alpha", "5")
    assert others.exit_code == 2
    assert "alpha: 8.0 then, 5.0 now" in others.output
    said = trained(data, stopped, model_folder, *options, "--resume")
    assert "step 60/60" in said
    assert "step 10/60" not in said
    trained(data, tmp_path / "whole", model_folder, *options)
    found = load_file(stopped / "adapter_model.safetensors")
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    assert not checkpoint.parent.exists()


def test_the_loss_falls_and_the_card_tells_the_run_but_no_key(
    data: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "learnt"
    options = ("--epochs", "12", "--data-name", "Words", "--licence", "CC0-1.0")
    secret = ("--api-key", "slk_secret", "--publish=http://here", "--name", "acme", "--resume")
    words = ["sharelora-serve", "train", str(data), *secret, str(output), *options]
    monkeypatch.setattr(sys, "argv", words)
    trained(data, output, model_folder, *options)
    card = (output / "README.md").read_text()
    assert f"    sharelora-serve train {data} {output} {' '.join(options)}\n" in card
    for text in ("# learnt", "ShareA", "Words", "CC0-1.0", "35 of 35 trained on, 5 held out"):
        assert text in card
    curve = [line.split("|") for line in card.partition("## Curve")[2].splitlines()]
    losses = [float(cells[2]) for cells in curve if len(cells) > 2 and cells[1].strip().isdecimal()]
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2
    assert (output / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["conversations", "all"])  # which begin alike, or not
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_hugging_face_over_the_answers_alone(
    architecture: str, kind: str, tmp_path: Path, seed: int
) -> None:
    folder = write_tiny_model(tmp_path / "tiny", architecture, seed)
    model = load_reference(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", seed, 8), tokenizer, 512)
    rows = rows[::2] if kind == "conversations" else rows
    batch = collate(rows)
    assert (batch.num_common > 20) is (kind == "conversations")
    settings = TrainSettings(MODULES, Method("A"))
    factors = add_factors(model, load_model_config(folder).layout("tiny"), settings)
    generator = torch.Generator().manual_seed(seed)
    for _, b in factors.pairs.values():
        b.data.normal_(generator=generator).mul_(0.1)
    labels = batch.tokens.masked_fill(~batch.labelled, -100)
    lengths = batch.labelled.int().cumsum(dim=1).argmax(dim=1)
    attended = (torch.arange(batch.tokens.shape[1]) <= lengths[:, None]).long()
    expected = model(input_ids=batch.tokens, attention_mask=attended, labels=labels).loss
    expected.backward()
    gradients = {name: factor.grad for name, factor in factors.trained.items()}
    trainer = Trainer(model, factors, rows, rows, settings, {})
    loss = trainer.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for factor in factors.trained.values():
        factor.grad = None
    loss.backward()
    for name, factor in factors.trained.items():
        torch.testing.assert_close(factor.grad, gradients[name], rtol=2e-3, atol=1e-4)
    assert trainer.validation_loss() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--modules", "q,z"), "there is no module 'z'"),
        (("--share", "none", "--share-only", "q"), "give --share too"),
        (("--modules", "q", "--share-only", "q,v"), "which --modules leaves out"),
        (("--share", "B", "--share-qkv"), "--share A or AB"),
        (("--share-qkv", "--modules", "q,o"), "at least two of q_proj, k_proj and v_proj"),
        (("--hold-out", "999"), "hold out fewer"),
        (("--publish", "http://127.0.0.1:9"), "--publish and --name go together"),
        (("--publish", "http://127.0.0.1:9", "--name", "a"), "is a server running there?"),
        (("--publish", "http://127.0.0.1:9", "--name", "my adapter"), "cannot name an adapter"),
        (("--resume",), "leave --resume out"),
        (("--user", "{prompt}"), "--user and --assistant go together"),
        (("--freeze-a-from", "no/such/adapter"), "no/such/adapter"),
        (("--alpha", "0"), "changes nothing"),
        (("--alpha", "nan"), "--alpha is nan, expected a finite number"),
        (("--epochs", "inf"), "--epochs is inf"),
        (("--learning-rate", "inf"), "--learning-rate is inf"),
        (("--rank", "97"), "more than the 96 features of the widest layer"),
        (("--max-length", "513"), "more than the base's context of 512 tokens"),
    ],
)
def test_what_does_not_go_together_is_told_before_any_step(
    options: tuple[str, ...], said: str, data: Path, tmp_path: Path, model_folder: Path
) -> None:
    result = train(data, tmp_path / "out", model_folder, *options)
    assert result.exit_code == 2
    assert said in result.output
    assert "step 1" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_as_it_is(
    data: Path, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "out").mkdir()
    result = train(data, tmp_path / "out", model_folder)
    assert result.exit_code == 2
    assert "exists; remove it or give another folder" in result.output


def test_a_rate_that_is_too_high_is_told(data: Path, tmp_path: Path, model_folder: Path) -> None:
    options = ("--learning-rate", "1e30", "--steps", "9", "--schedule", "constant")
    result = train(data, tmp_path / "out", model_folder, *options)
    assert result.exit_code == 2
    assert "give a lower --learning-rate than 1e+30" in result.output


def test_what_the_stored_type_cannot_hold_is_told_and_can_be_written_in_another(
    data: Path, tmp_path: Path, model_folder: Path
) -> None:
    options = ("--steps", "3", "--save-every", "3")
    short = ("--rank", "4", "--batch-size", "4", "--hold-out", "5", "--learning-rate", "1e-9")
    arguments = ["train", str(data), str(tmp_path / "out"), "--model", str(model_folder)]
    arguments += [*short, *options]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "does not fit float16" in refused.output
    assert "give --resume --dtype float32" in refused.output
    result = CliRunner().invoke(app, [*arguments, "--resume", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "12 of 35 trained on" in (tmp_path / "out" / "README.md").read_text()


def test_a_form_has_a_rate_of_its_own(data: Path, tmp_path: Path, model_folder: Path) -> None:
    for form, options in FORMS.items():
        arguments = ["train", str(data), str(tmp_path / form), "--model", str(model_folder)]
        result = CliRunner().invoke(app, [*arguments, "--steps", "1", "--rank", "2", *options])
        assert result.exit_code == 0, result.output
        rate = "0.01" if form in ("frozen", "share-ab") else "0.003"
        assert f"learning rate {rate}," in (tmp_path / form / "README.md").read_text()


@pytest.mark.parametrize(
    ("schedule", "known_as"),
    [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")],
)
def test_the_rate_goes_as_in_transformers(
    schedule: Schedule, known_as: str, tmp_path: Path, model_folder: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    num_steps, warm_up = drawn.randint(20, 40), drawn.choice((0.0, 0.1, 0.3))
    settings = TrainSettings(
        MODULES[:1], Method("A"), schedule=schedule, warm_up=warm_up, num_steps=num_steps
    )
    model = load_reference(model_folder)
    factors = add_factors(model, load_model_config(model_folder).layout("tiny"), settings)
    rows = [Row((1, 2), (3,), line) for line in range(8)]
    trainer = Trainer(model, factors, rows, [], settings, {})
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    trainer.train(
        tmp_path, save_every=99, evaluate_every=99, resume=False, stop=threading.Event(),
        report=lambda _: None,
    )  # fmt: skip
    hook.remove()
    num_warm = round(warm_up * num_steps)
    optimizer = torch.optim.SGD(factors.trained.values(), lr=settings.learning_rate)
    peer: Any = get_scheduler(known_as, optimizer, num_warm, num_steps)
    # There the first step has a rate of 0; here none is in vain.
    expected = [peer.lr_lambdas[0](step + (step < num_warm)) for step in range(num_steps)]
    assert [rate / settings.learning_rate for rate in rates] == pytest.approx(expected)


def test_a_run_on_another_base_than_before_is_not_gone_on_with(
    data: Path, tmp_path: Path, seed: int
) -> None:
    base = tmp_path / "base"
    write_tiny_model(base, "llama", seed=seed)
    options = ("--steps", "400", "--save-every", "1")
    with start(data, tmp_path / "out", base, *options) as process:
        while not (tmp_path / ".out.checkpoint" / "checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    write_tiny_model(base, "llama", seed=seed + 1)
    result = train(data, tmp_path / "out", base, *options, "--resume")
    assert result.exit_code == 2
    assert "weights: '" in result.output


def test_what_is_trained_is_published_and_answers_from_the_server(
    data: Path, tmp_path: Path, model_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = {row.line: row for row in read_rows(data, tokenizer, 512)}
    with running_server(
        tmp_path / "log", "--model", str(model_folder), "--dtype", "float32"
    ) as server:
        for steps in ("20", "30"):  # the second time it is a new version
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            options = ("--steps", steps, "--publish", server.url, "--name", "acme")
            said = trained(data, tmp_path / "out", model_folder, *options)
            asked = re.search(r"Asked with line (\d+) of the data:", said)
            assert asked is not None
            row = prompts[int(asked[1])]
            assert tokenizer.decode(row.prompt_ids, skip_special_tokens=True).strip() in said
            with server.openai() as client:
                of_adapter, of_base = (
                    client.completions.create(
                        model=name,
                        prompt=list(row.prompt_ids),
                        max_tokens=len(row.answer_ids) + 16,
                        temperature=0,
                    )
                    for name in ("acme", "tiny")
                )
            assert said.endswith(f"acme answers:\n{of_adapter.choices[0].text.strip()}\n")
            assert of_adapter.choices[0].text != of_base.choices[0].text
        with server.http() as http:
            published = http.get("/v1/adapters/acme").json()
        assert published["sharing"] == "ShareA"
        assert len(published["versions"]) == 2


def test_a_run_over_another_a_than_before_is_not_gone_on_with(
    data: Path, tmp_path: Path, model_folder: Path
) -> None:
    common = tmp_path / "common"
    options = ("--steps", "40", "--freeze-a-from", str(common), "--save-every", "1")
    trained(data, common, model_folder, "--steps", "2", "--seed", "1")
    with start(data, tmp_path / "out", model_folder, *options) as process:
        while not (tmp_path / ".out.checkpoint" / "checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    shutil.rmtree(common)
    trained(data, common, model_folder, "--steps", "2", "--seed", "2")
    result = train(data, tmp_path / "out", model_folder, *options, "--resume")
    assert result.exit_code == 2
    assert "frozen: '" in result.output
