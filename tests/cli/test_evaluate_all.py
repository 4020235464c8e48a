"""All nine benchmarks in their official formats through the command line, offline, with a model from disk."""

import json
from pathlib import Path

import pytest

from chats import make_chat
from evaluation import benchmark_files as files
from tinyllava.cli import main
from tinyllava.evaluation.answers import read_answers
from tinyllava.evaluation.benchmarks import PAPER_BENCHMARKS
from tinyllava.evaluation.results import load_results
from tinyllava.inference.chat import Chat

WRITERS = {
    "vqav2": files.vqav2_test,
    "gqa": files.gqa,
    "scienceqa": files.scienceqa,
    "textvqa": files.textvqa,
    "pope": files.pope,
    "mmvet": files.mmvet,
    "llava-w": files.llava_w,
    "mme": files.mme,
    "mmbench": files.mmbench,
}
UPLOADS = {
    "vqav2/upload/vqav2_upload.json",
    "gqa/upload/testdev_balanced_predictions.json",
    "mmvet/upload/mm-vet_answers.json",
    "llava-w/upload/llava_w_answers.jsonl",
    "mme/upload/existence.txt",
    "mmbench/upload/mmbench_upload.xlsx",
    "pope/upload/coco_pope_adversarial_answers.json",
    "scienceqa/upload/scienceqa_results.json",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A toy checkpoint on disk; every third token ends its answers, so that they are short."""
    folder = tmp_path_factory.mktemp("model")
    chat = make_chat(folder, "llama")
    chat.model.generation_config.eos_token_id = list(range(2, 500, 3))
    chat.model.save_pretrained(folder / "model")
    chat.processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, write in WRITERS.items():
        questions = PAPER_BENCHMARKS[name].load(write(folder / name))
        for n, path in enumerate({image.path for one in questions for image in one.conversation.images}):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.png(40 * n))
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    grades = {"v1_0": "0.5", "v1_1": "1.0", "v1_2": "0.3"}
    record = {
        key: {"model": ["gpt-4-0613"], "score": [float(grade)], "content": [grade]}
        for key, grade in grades.items()
    }
    files.write_json(folder / "mmvet.json", record)
    replies = ["8 4\nReasons.", "9 9", "10 5", "nothing to read"]
    lines = [{"question_id": n, "judge": "gpt-4-0314", "content": text} for n, text in enumerate(replies)]
    files.write_lines(folder / "llava-w.jsonl", lines)
    return folder


def test_all_nine_at_once(model, data, reviews, tmp_path, capsys):
    arguments = ["evaluate", str(model), "--data", str(data), "--output", str(tmp_path)]
    arguments += ["--benchmarks", "all", "--reviews", str(reviews)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    first = load_results(tmp_path / "results.json")
    results = {result.benchmark: result for result in first}
    assert list(results) == list(PAPER_BENCHMARKS)
    chat, different = Chat.open(model), set()
    for name, benchmark in PAPER_BENCHMARKS.items():
        questions = benchmark.load(data / name)
        alone = {q.id: chat.answer([q.conversation], benchmark.max_new_tokens)[0] for q in questions}
        assert read_answers(tmp_path / name, questions) == alone
        different |= set(alone.values())
        result = results[name]
        assert (result.num_missing, result.is_partial, result.dtype) == (0, True, "float32")
        assert f"{name} ({benchmark.protocol}): " in printed
        if benchmark.judging is None:
            assert result.metrics == benchmark.score(questions, alone).metrics
        assert bool(result.metrics) == (name != "vqav2")
    assert len(different) > 20, "the answers have to hang on what is asked"
    assert results["mmvet"].judge == "gpt-4-0613"
    assert results["mmvet"].value == pytest.approx(100 * (0.5 + 1.0 + 0.3) / 3)
    assert results["llava-w"].judge == "gpt-4-0314"
    ratio = 100 * (4 + 9 + 5 - 1) / (8 + 9 + 10 - 1)
    assert results["llava-w"].value == round(ratio, 1)  # as the official script prints it
    (release,) = (note for note in results["mmbench"].notes if "md5" in note)
    assert release.startswith("mmbench_dev_20230712.tsv: unknown release, md5 ")
    assert {path for path in UPLOADS if not (tmp_path / path).is_file()} == set()
    upload = json.loads((tmp_path / "vqav2/upload/vqav2_upload.json").read_text())
    assert [entry["question_id"] for entry in upload] == [1000, 1001, 1002, 1003, 1004, 1005]
    assert [entry["answer"] for entry in upload[4:]] == ["", ""]
    assert main([*arguments, "--score-only"]) == 0
    assert [one.metrics for one in load_results(tmp_path / "results.json")] == [one.metrics for one in first]


def test_reviews_of_two_judges_in_one_folder_are_refused(data, tmp_path, capsys):
    for judge in ("a", "b"):
        files.write_lines(tmp_path / "old" / "mmvet" / f"reviews-{judge}.jsonl", [])
    arguments = ["--benchmarks", "mmvet", "--data", str(data), "--reviews", str(tmp_path / "old")]
    assert main(["evaluate", "no-such-model", *arguments]) == 2
    assert "several reviews of mmvet: mmvet/reviews-a.jsonl, mmvet/reviews-b.jsonl" in capsys.readouterr().err
