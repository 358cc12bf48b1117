"""Examples to rehearse: what may be one, the best of each cluster, and what the command writes."""

import json
import sys

import numpy as np
import pytest

from fuse.cli import main
from fuse.commands.models import load_classifier
from fuse.demo.tokenizer import arithmetic_tokenizer
from fuse.demo.warmup import small_llama
from fuse.recipe.preferences import BadRow
from fuse.recipe.rehearsal import best_of_each, clusters_of, examples_of, scores_by_cluster
from fuse.training.reading import TokenSequence
from fuse.training.scoring import scores

from ..tiny_models import advantage_model, build, spread


def test_the_best_of_each_cluster_are_kept_and_of_equal_ones_the_first():
    clusters, of_each = [1, 0, 1, 0, 1, 3], [0.5, 2.0, 0.7, 2.0, 0.6, -9.0]
    assert best_of_each(clusters, of_each, 1) == [1, 2, 5]
    assert best_of_each(clusters, of_each, 2) == [1, 3, 2, 4, 5]
    assert scores_by_cluster(clusters, of_each) == [[2.0, 2.0], [0.5, 0.7, 0.6], [-9.0]]


def test_rows_are_responses_or_preferences_and_each_counts_once():
    tokenizer = arithmetic_tokenizer()
    rows = [
        {"prompt": "1+1=", "response": "#2", "source": "a"},
        {"prompt": "1+1=", "chosen": "#2", "rejected": "#3"},
        {"prompt": "1+2=", "chosen": "#3", "rejected": ""},
        {"prompt": "1+2="},
        {"prompt": "1+2=", "response": "#3333333333"},
    ]
    examples, bad, num_repeated = examples_of(rows, tokenizer, 10)
    assert [(one.row, one.response, one.columns) for one in examples] == [
        (0, "#2", {"source": "a"}),
        (2, "#3", {"source": None}),
    ]
    end = tokenizer.eos_token_id
    assert examples[0].tokens == TokenSequence(tokenizer("1+1=").input_ids, [*tokenizer("#2").input_ids, end])
    assert bad == [BadRow(3, "no response"), BadRow(4, "longer than the model's 10 positions")]
    assert num_repeated == 1


def test_clusters_are_what_lies_together():
    pytest.importorskip("sklearn")
    centres = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]])
    group = np.arange(30) % 3
    embeddings = centres[group] + np.random.default_rng(0).normal(size=(30, 3))
    found = clusters_of(embeddings, 3, seed=1)
    assert len(set(zip(found, group, strict=True))) == len(set(found)) == 3
    assert found == clusters_of(embeddings, 3, seed=1)
    with pytest.raises(ValueError, match="31 clusters of 30 responses: ask for fewer, or give more"):
        clusters_of(embeddings, 31, seed=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rehearsal")
    tokenizer = arithmetic_tokenizer()
    small_llama(tokenizer, seed=0, hidden_size=32, num_layers=1).save_pretrained(directory / "policy")
    spread(build(advantage_model(vocab_size=len(tokenizer)))).save_pretrained(directory / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(directory / name)
    rows = [{"prompt": f"{a}+{b}=", "response": f"#{a}" * (1 + b % 5)} for a in range(4) for b in range(10)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rehearsal_rewards.py").write_text(
        "def length(prompts, responses):\n    return [len(response) for response in responses]\n"
    )
    return directory


def command(toy, *options):
    return ["rehearsal", f"--model={toy / 'policy'}", f"--data={toy / 'data.jsonl'}", "--clusters=4", *options]


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_function_scores_texts_and_the_best_of_clusters_are_written(toy, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(toy)
    monkeypatch.setattr(sys, "path", [str(toy), *sys.path])
    out, again, results = (toy / name for name in ("one.jsonl", "two.jsonl", "results.json"))
    options = ("--reward-function=rehearsal_rewards:length", "--per-cluster=2")
    assert main(command(toy, *options, f"--out={out}", f"--json={results}")) == 0
    assert main(command(toy, *options, f"--out={again}")) == 0
    assert out.read_text() == again.read_text()
    kept, told = written(out), json.loads(results.read_text())
    assert len(kept) == told["num_kept"] == 8
    assert all(row["score"] == len(row["response"]) for row in kept)
    assert [row["score"] for row in kept[::2]] == [cluster["best_score"] for cluster in told["clusters"]]
    assert sum(cluster["num_responses"] for cluster in told["clusters"]) == told["num_rows"] == 40
    assert told["kept_mean_score"] > told["mean_score"]
    assert "8 of 40 responses kept, of 4 clusters" in capsys.readouterr().out


def test_a_reward_model_scores_tokens(toy):
    pytest.importorskip("sklearn")
    out = toy / "by_model.jsonl"
    assert main(command(toy, f"--reward-model={toy / 'reward'}", f"--out={out}")) == 0
    tokenizer = arithmetic_tokenizer()
    rows = written(out)
    assert len(rows) == 4
    sequences = [
        TokenSequence(
            tokenizer(row["prompt"]).input_ids, [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        )
        for row in rows
    ]
    model = load_classifier(str(toy / "reward")).eval()
    assert [row["score"] for row in rows] == pytest.approx(scores(model, sequences), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "give --reward-model PATH or --reward-function MODULE:FUNCTION"),
        (["--reward-model=./nowhere"], "no model at ./nowhere"),
        (["--reward-function=nothing"], "is not of the form module:function"),
        (["--reward-model=x", "--clusters=0"], "--clusters is 0: it must be at least 1"),
        (["--reward-function=os:getcwd", "--data=./none.jsonl"], "dataset none.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_line(toy, tmp_path, capsys, given, line):
    assert main(command(toy, f"--out={tmp_path / 'out.jsonl'}", *given)) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_rows_without_a_response_are_refused_by_number(toy, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1="}\n')
    assert main(command(toy, f"--out={tmp_path / 'o'}", f"--data={bad}", "--reward-function=os:getcwd")) == 2
    assert "1 of 1 rows are no prompts with a response (rows by number, no response: 0)" in capsys.readouterr().err
