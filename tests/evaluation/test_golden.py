"""Every benchmark's numbers once more, by naive programs over the official files and the exported answers.

Each naive program follows the formula of the official tool and shares no code with ours, but for the VQA
normalisers, which have a naive reading of their own in ``scoring``.
"""

import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from evaluation import benchmark_files as files
from tinyllava.evaluation.benchmarks import BENCHMARKS
from tinyllava.evaluation.metrics.vqa import normalise_evalai, normalise_vqa
from tinyllava.evaluation.question import Question

WORDS = ["yes", "no", "Red", "red.", "two", "2", "a cat", "cat", "café", ""]


def run(
    name: str, folder: Path, choose: Callable[[Question], str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Score chosen answers, export them to ``folder/out``; return the metrics and the answers by id."""
    benchmark = BENCHMARKS[name]
    questions = benchmark.load(folder)
    answers = {question.id: choose(question) for question in questions}
    if benchmark.export is not None:
        benchmark.export(questions, answers, folder, folder / "out")
    metrics = benchmark.score(questions, answers).metrics
    assert len({metric.name for metric in metrics}) == len(metrics)
    return {metric.name: metric.value for metric in metrics}, answers


def mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def means(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of the values of each name."""
    by_name = defaultdict(list)
    for name, value in pairs:
        by_name[name].append(value)
    return {name: mean(values) for name, values in by_name.items()}


def leave_one_out(answer: str, humans: list[str]) -> float:
    shares = []
    for i in range(10):
        others = humans[:i] + humans[i + 1 :]
        shares.append(min(1.0, others.count(answer) / 3))
    return sum(shares) / 10


def human_answers(generator: random.Random) -> list[str]:
    if generator.random() < 0.3:
        return [generator.choice(WORDS[:-1])] * 10
    return generator.choices(WORDS[:-1], weights=[9, 7, 3, 3, 2, 2, 1, 1, 1], k=10)


@pytest.mark.parametrize("seed", range(3))
def test_vqav2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = random.Random(seed)
    kinds = [("yes/no", "is this"), ("number", "how many"), ("other", "what")]
    table = [
        (1000 * (n // 3) + n, n // 3, f"Question {n}?", *generator.choice(kinds), human_answers(generator))
        for n in range(60)
    ]
    monkeypatch.setattr(files, "VQA_QUESTIONS", table)
    folder = files.vqav2_val(tmp_path)
    ours, answers = run("vqav2-val", folder, lambda _: generator.choice(WORDS))
    pairs = []
    document = json.loads((folder / "v2_mscoco_val2014_annotations.json").read_text())
    for one in document["annotations"]:
        humans = [entry["answer"] for entry in one["answers"]]
        answer = normalise_evalai(answers[str(one["question_id"])])
        if len(set(humans)) > 1:
            humans, answer = [normalise_vqa(human) for human in humans], normalise_vqa(answer)
        score = leave_one_out(answer, humans)
        names = ("accuracy", f"answer_type={one['answer_type']}", f"question_type={one['question_type']}")
        pairs += [(name, score) for name in names]
    assert ours == pytest.approx(means(pairs))


def test_textvqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    table = [(n, f"{n // 2:016x}", f"question {n}?", ["A"], human_answers(generator)) for n in range(60)]
    monkeypatch.setattr(files, "TEXTVQA", table)
    ours, answers = run("textvqa", files.textvqa(tmp_path), lambda _: generator.choice(WORDS))
    scores = [
        leave_one_out(normalise_evalai(answers[str(n)]), list(map(normalise_evalai, humans)))
        for n, *_, humans in table
    ]
    assert ours == pytest.approx({"accuracy": mean(scores)})


def test_gqa(tmp_path: Path) -> None:
    generator = random.Random(2)
    words = ["yes", "no", "man", "women", "dress"]
    steps = [
        ("select", "sky"),
        ("exist", "?"),
        ("query", "name"),
        ("choose name", "a|b"),
        ("relate", "x"),
        ("query", "color"),
        ("filter", "exist"),
    ]
    entries = {
        str(n): files.gqa_entry(
            " ".join(["Who"] * generator.randint(1, 4)),
            generator.choice(words),
            generator.choice(["query", "verify", "choose"]),
            generator.choice([None, "person", "clothing"]),
            generator.choices(steps, k=generator.randint(1, 5)),
        )
        for n in range(80)
    }
    files.write_json(tmp_path / "testdev_balanced_questions.json", entries)
    ours, _ = run("gqa", tmp_path, lambda _: generator.choice([*words, "Man.", "NO..", "yes sir"]))
    exported = json.loads((tmp_path / "out" / "testdev_balanced_predictions.json").read_text())
    predicted = {one["questionId"]: one["prediction"] for one in exported}
    pairs, gold, given = [], defaultdict(list), defaultdict(list)
    for key, one in entries.items():
        right = float(predicted[key] == one["answer"])
        counted = 0
        for step in one["semantic"]:
            text = step["operation"] + ": " + step["argument"]
            counted += "exist" not in text and "query: name" not in text and "choose name" not in text
        structural = one["types"]["structural"]
        names = ["accuracy", "answer_type=" + ("open" if structural == "query" else "binary")]
        names += [f"structural={structural}", "semantic=attr", f"steps={counted}"]
        names += [f"words={len(one['question'].split())}"]
        pairs += [(name, right) for name in names]
        if one["groups"]["global"] is not None:
            gold[one["groups"]["global"]].append(one["answer"])
            given[one["groups"]["global"]].append(predicted[key])
    total = weighted = 0.0
    for group, truths in gold.items():
        chi = sum((given[group].count(a) - truths.count(a)) ** 2 / truths.count(a) for a in set(truths))
        total, weighted = total + len(truths), weighted + chi * len(truths)
    assert ours == pytest.approx({**means(pairs), "distribution": weighted / total / 100})


def test_scienceqa(tmp_path: Path) -> None:
    generator = random.Random(3)
    problems = {
        str(n): {
            "question": "Which?",
            "choices": list("vwxyz")[: generator.randint(2, 5)],
            "answer": n % 2,
            "hint": generator.choice(["", "A hint."]),
            "image": generator.choice([None, "image.png"]),
            "subject": generator.choice(["natural science", "social science", "language science"]),
            "grade": f"grade{generator.randint(1, 12)}",
            "topic": generator.choice(["biology", "verbs"]),
        }
        for n in range(80)
    }
    files.write_json(tmp_path / "problems.json", problems)
    files.write_json(tmp_path / "pid_splits.json", {"test": list(problems)})
    replies = ["A", "B", "A. v", "The answer is B.", "E", "C", "none", "The answer is A. The answer is B."]
    ours, _ = run("scienceqa", tmp_path, lambda _: generator.choice(replies))
    chosen = json.loads((tmp_path / "out" / "scienceqa_results.json").read_text())["results"]
    assert list(chosen) == list(problems)
    pairs = []
    for key, one in problems.items():
        right = float(chosen[key] == one["answer"])
        names = ["accuracy", f"subject={one['subject']}", f"topic={one['topic']}"]
        names += ["context=text"] * bool(one["hint"]) + ["context=none"] * (
            not one["hint"] and not one["image"]
        )
        names += ["context=image", "image_accuracy"] * bool(one["image"])
        names += ["grades=1 to 6" if int(one["grade"][5:]) < 7 else "grades=7 to 12"]
        pairs += [(name, right) for name in names]
    assert ours == pytest.approx(means(pairs))


def test_pope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(4)
    table = {split: generator.choices(["yes", "no"], k=40) for split in files.POPE}
    monkeypatch.setattr(files, "POPE", table)
    replies = ["Yes", "No", "no, it is", "There is not. Yes", "maybe", "NO", "not"]
    ours, _ = run("pope", files.pope(tmp_path), lambda _: generator.choice(replies))
    expected, f1s, num_right = {}, [], 0
    for split in table:
        lines = (tmp_path / f"coco_pope_{split}.json").read_text().splitlines()
        answered = (tmp_path / "out" / f"coco_pope_{split}_answers.json").read_text().splitlines()
        counts = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}
        for line, answer in zip(map(json.loads, lines), map(json.loads, answered), strict=True):
            assert line["text"] == answer["question"]
            text = answer["answer"].split(".")[0].replace(",", "").split(" ")
            is_yes = not ("No" in text or "not" in text or "no" in text)
            counts[("T" if is_yes == (line["label"] == "yes") else "F") + ("P" if is_yes else "N")] += 1
        tp, fp, tn, fn = counts.values()
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        f1s.append(2 * precision * recall / (precision + recall))
        num_right += tp + tn
        rates = {
            "f1": f1s[-1],
            "accuracy": (tp + tn) / 40,
            "precision": precision,
            "recall": recall,
            "yes_ratio": (tp + fp) / 40,
        }
        expected |= {f"{split} {name}": 100 * rate for name, rate in rates.items()}
        expected |= {f"{split} {name}": num for name, num in counts.items()}
    assert ours == pytest.approx({"f1": mean(f1s), "accuracy": 100 * num_right / 120, **expected})


def test_mme(tmp_path: Path) -> None:
    generator = random.Random(5)
    tasks = {"existence": 0, "OCR": 0, "posters": 0, "code_reasoning": 1, "text_translation": 1}
    for task in tasks:
        folder = tmp_path / "MME_Benchmark_release_version" / task
        folder.mkdir(parents=True)
        for n in range(12):
            (folder / f"{n:04}.txt").write_text(
                f"Is it {n}? Please answer yes or no.\tYes\nIs it {n + 1}? Please answer yes or no.\tNo\n"
            )
    replies = ["Yes", "No", "yes.", "no!", "I think yes", "nothing", ""]
    ours, _ = run("mme", tmp_path, lambda _: generator.choice(replies))
    sums, expected = [0.0, 0.0], {}
    for task, kind in tasks.items():
        lines = [line.split("\t") for line in (tmp_path / "out" / f"{task}.txt").read_text().splitlines()]
        rights = []
        for _, _, gold, answer in lines:
            start = answer.lower()[:4]
            said = "yes" if "yes" in start else "no" if "no" in start else "other"
            rights.append(said == gold.lower())
        both = [first and second for first, second in zip(rights[::2], rights[1::2], strict=True)]
        acc, plus = mean(rights), mean(both)
        expected |= {task: acc + plus, f"{task} acc": acc, f"{task} acc+": plus}
        sums[kind] += acc + plus
    expected |= {"perception": sums[0], "cognition": sums[1], "total": sum(sums)}
    assert ours == pytest.approx(expected)


def test_mmbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(6)
    table = [
        (
            n,
            f"Question {n}?",
            "",
            ["red", "blue", "green", "black"][: 2 + n % 3],
            n % 2,
            f"kind {n % 5}",
            f"level {n % 2}",
        )
        for n in range(40)
    ]
    monkeypatch.setattr(files, "MMBENCH_QUESTIONS", table)
    folder = files.mmbench(tmp_path)
    ours, answers = run(
        "mmbench", folder, lambda q: q.target["answer"] if generator.random() < 0.85 else "none of it"
    )
    with (folder / "mmbench_dev_20230712.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    groups: dict[int, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[int(row["index"]) % 1_000_000].append(row)
    pairs = []
    for group in groups.values():
        right = float(all(answers[row["index"]] == row["answer"] for row in group))
        names = ("circular", f"category={group[0]['category']}", f"l2-category={group[0]['l2-category']}")
        pairs += [(name, right) for name in names]
        pairs.append(("single_pass", float(answers[group[0]["index"]] == group[0]["answer"])))
    assert 0 < ours["circular"] < ours["single_pass"] < 100
    assert ours == pytest.approx(means(pairs))


def judged(name: str, folder: Path, reviews: Mapping[str, str]) -> dict[str, float]:
    questions = BENCHMARKS[name].load(folder)
    answers = {question.id: "An answer." for question in questions}
    metrics = BENCHMARKS[name].score(questions, answers, reviews, "judge").metrics
    return {metric.name: metric.value for metric in metrics}


def test_mmvet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(7)
    capabilities = ["rec", "ocr", "know", "gen", "spat", "math"]
    table = {
        f"v1_{n}": {
            "imagename": "v1_0.png",
            "question": "What?",
            "answer": "a",
            "imagesource": "u",
            "capability": generator.sample(capabilities, k=1 + n % 3),
        }
        for n in range(40)
    }
    monkeypatch.setattr(files, "MMVET", table)
    reviews = {key: generator.choice(["0.0", "0.4 because", "1.0", "1", "nothing", "1.1"]) for key in table}
    points = {"0.0": 0.0, "0.4 because": 0.4, "1.0": 1.0, "1": 1.0, "nothing": 0.0, "1.1": 0.0}
    pairs = []
    for key, one in table.items():
        order = [name for name in capabilities if name in one["capability"]]
        names = ["accuracy", "set=" + "+".join(order), *(f"capability={name}" for name in order)]
        pairs += [(name, points[reviews[key]]) for name in names]
    assert judged("mmvet", files.mmvet(tmp_path), reviews) == pytest.approx(means(pairs))


def test_llava_w(tmp_path: Path) -> None:
    folder = files.llava_w(tmp_path)
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    generator = random.Random(8)
    reviews = {str(line["question_id"]): generator.choice(["8 7\n", "9 6.5", "8, 7", "x"]) for line in lines}
    points = {"8 7\n": (8, 7), "9 6.5": (9, 6.5), "8, 7": (-1, -1), "x": (-1, -1)}
    expected = {}
    for name in ("all", "conv", "detail", "complex"):
        chosen = [line for line in lines if name in ("all", line["category"])]
        references = [points[reviews[str(line["question_id"])]][0] for line in chosen]
        models = [points[reviews[str(line["question_id"])]][1] for line in chosen]
        first, second = (round(sum(points) / len(chosen), 3) for points in (references, models))
        expected[name] = round(second / first * 100, 1)
        expected[f"{name} reference"] = round(first * 10, 1)
        expected[f"{name} model"] = round(second * 10, 1)
    assert judged("llava-w", folder, reviews) == pytest.approx(expected)
