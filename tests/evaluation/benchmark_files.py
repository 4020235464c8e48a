"""Small benchmarks in their official formats, made here: every function fills a folder and returns it."""

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."


def png(shade: int = 0) -> bytes:
    """An image of one colour, 8 x 8 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 80, 160)).save(buffer, "PNG")
    return buffer.getvalue()


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def cell(shade: int) -> dict:
    return {"bytes": png(shade), "path": None}


VQA_QUESTIONS = [
    # id, image, question, answer type, question type, ten answers
    (262148000, 262148, "Is this sunny?", "yes/no", "is this", ["yes"] * 10),
    (262148001, 262148, "How many dogs?", "number", "how many", ["2"] * 3 + ["two"] * 3 + ["3"] * 4),
    (393225000, 393225, "What colour?", "other", "what color", ["Red."] + ["red"] * 2 + ["blue"] * 7),
    (393225001, 393225, "Qu'est-ce que c'est ?", "other", "what is", ["café"] * 9 + ["cafe"]),
]


def vqav2_val(folder: Path) -> Path:
    questions = [{"image_id": p, "question": q, "question_id": i} for i, p, q, *_ in VQA_QUESTIONS]
    annotations = [
        {
            "question_type": kind,
            "multiple_choice_answer": answers[0],
            "image_id": image,
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)
            ],
            "answer_type": answer_type,
            "question_id": question_id,
        }
        for question_id, image, _, answer_type, kind, answers in VQA_QUESTIONS
    ]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return folder


def vqav2_val_parquet(folder: Path) -> Path:
    rows = [
        {
            "question_type": kind,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)
            ],
            "image_id": image,
            "answer_type": answer_type,
            "question_id": question_id,
            "question": question,
            "image": cell(image),
        }
        for question_id, image, question, answer_type, kind, answers in VQA_QUESTIONS
    ]
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows)
    return folder


def vqav2_test(folder: Path) -> Path:
    records = [
        {
            "question_id": 1000 + n,
            "image": f"COCO_test2015_{n // 2:012d}.jpg",
            "text": f"Question {n}?{SHORT}",
            "category": "default",
        }
        for n in range(6)
    ]
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", records[:4])
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", records)
    return folder


def gqa_entry(
    question: str, answer: str, structural: str, group: str | None, steps: list[tuple[str, str]]
) -> dict:
    return {
        "question": question,
        "imageId": "n161313",
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "attr", "detailed": "chooseAttr"},
        "semantic": [{"operation": op, "argument": arg, "dependencies": []} for op, arg in steps],
        "groups": {"global": group, "local": "10q"},
        "entailed": [],
        "fullAnswer": f"It is {answer}.",
    }


def gqa(folder: Path) -> Path:
    entries = {
        "201307251": gqa_entry("Is it overcast?", "no", "verify", None, [("select", "sky"), ("exist", "?")]),
        "201640614": gqa_entry(
            "Who wears the dress?",
            "women",
            "query",
            "person",
            [("select", "dress"), ("relate", "person"), ("query", "name")],
        ),
        "202225914": gqa_entry(
            "What is left of the woman?",
            "dress",
            "query",
            "clothing",
            [("select", "woman"), ("query", "name"), ("relate", "left")],
        ),
        "203": gqa_entry("Who sits?", "man", "query", "person", [("select", "man"), ("query", "name")]),
    }
    entries["203"]["imageId"] = "n2"
    write_json(folder / "testdev_balanced_questions.json", entries)
    return folder


def gqa_parquet(folder: Path) -> Path:
    entries = json.loads((gqa(folder / "official") / "testdev_balanced_questions.json").read_text())
    rows = [{"id": question_id, **entry} for question_id, entry in entries.items()]
    root = folder / "mirror"
    write_parquet(root / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    images = [{"id": name, "image": cell(n)} for n, name in enumerate(("n161313", "n2"))]
    write_parquet(root / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)
    return root


SCIENCE = {
    "11": {
        "question": "Which is a mammal?",
        "choices": ["frog", "bat"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "subject": "natural science",
        "grade": "grade3",
        "topic": "biology",
    },
    "12": {
        "question": "Where is it?",
        "choices": ["Peru", "Chad", "Fiji"],
        "answer": 0,
        "hint": "Look at  the map. ",
        "image": "image.png",
        "subject": "social science",
        "grade": "grade7",
        "topic": "geography",
    },
    "13": {
        "question": "Which word rhymes?",
        "choices": ["a", "b", "c", "d", "e"],
        "answer": 4,
        "hint": "Passage: été.",
        "image": None,
        "subject": "language science",
        "grade": "grade2",
        "topic": "verbs",
    },
    "14": {
        "question": "Pick.",
        "choices": ["x", "y"],
        "answer": 0,
        "hint": "",
        "image": None,
        "subject": "language science",
        "grade": "grade2",
        "topic": "word-study",
    },
    "15": {
        "question": "Not in test.",
        "choices": ["x", "y"],
        "answer": 0,
        "hint": "",
        "image": None,
        "subject": "language science",
        "grade": "grade2",
        "topic": "word-study",
    },
}


def scienceqa(folder: Path) -> Path:
    write_json(folder / "problems.json", SCIENCE)
    write_json(folder / "pid_splits.json", {"train": ["15"], "test": ["11", "12", "13", "14"]})
    return folder


def scienceqa_parquet(folder: Path) -> Path:
    rows = [
        {**entry, "image": cell(int(question_id)) if entry["image"] else None}
        for question_id, entry in SCIENCE.items()
        if question_id != "15"
    ]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return folder


TEXTVQA = [
    # question id, image, question, tokens, ten answers
    (
        34602,
        "003a8ae2ef43b901",
        "what is the brand of this camera?",
        ["PERFECT", "DAKOTA"],
        ["dakota"] * 5 + ["Dakota digital"] * 4 + ["unanswerable"],
    ),
    (34603, "003a8ae2ef43b901", "what number is it?", ["PERFECT", "DAKOTA"], ["two"] * 2 + ["2"] * 8),
    (34604, "0054c91397f2fe05", "What does the sign say?", [], ["the stop"] * 10),
]


def textvqa(folder: Path, *, with_llava: bool = True) -> Path:
    data = [{"question_id": i, "image_id": p, "question": q, "answers": a} for i, p, q, _, a in TEXTVQA]
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": data})
    if with_llava:
        write_lines(
            folder / "llava_textvqa_val_v051_ocr.jsonl",
            [
                {
                    "question_id": p,
                    "image": f"{p}.jpg",
                    "category": "default",
                    "text": f"{q.capitalize()}\nReference OCR token: {', '.join(tokens)}{SHORT}",
                }
                for _, p, q, tokens, _ in TEXTVQA
            ],
        )
    else:
        tokens = {p: t for _, p, _, t, _ in TEXTVQA}
        document = {"data": [{"image_id": p, "ocr_tokens": t} for p, t in tokens.items()]}
        write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", document)
    return folder


def textvqa_parquet(folder: Path) -> Path:
    rows = [
        {"image_id": p, "question_id": i, "question": q, "ocr_tokens": t, "answers": a, "image": cell(i)}
        for i, p, q, t, a in TEXTVQA
    ]
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows)
    return folder


POPE = {
    "adversarial": ["yes", "no", "no", "yes"],
    "popular": ["yes", "no", "no", "yes"],
    "random": ["yes", "no", "yes"],
}


def pope_image(number: int) -> str:
    return f"COCO_val2014_{number // 2:012d}.jpg"


def pope(folder: Path) -> Path:
    for split, labels in POPE.items():
        records = [
            {"question_id": n + 1, "image": pope_image(n), "text": f"Is there a {split} {n}?", "label": label}
            for n, label in enumerate(labels)
        ]
        write_lines(folder / f"coco_pope_{split}.json", records)
    return folder


def pope_parquet(folder: Path) -> Path:
    rows = [
        {
            "id": str(n),
            "question_id": str(n + 1),
            "question": f"Is there a {split} {n}?",
            "answer": label,
            "image_source": pope_image(n).removesuffix(".jpg"),
            "image": cell(n // 2),
            "category": split,
        }
        for split, labels in POPE.items()
        for n, label in enumerate(labels)
    ]
    write_parquet(folder / "Full" / "test-00000-of-00001.parquet", rows)
    return folder


def mme(folder: Path) -> Path:
    root = folder / "MME_Benchmark_release_version"
    flat = {
        "existence": {
            "0001": (
                "Is there a cat? Please answer yes or no.\tYes\n"
                "Is there a dog? Please answer yes or no.\tNo\n"
            ),
            "0002": ("Is it day?  Please answer yes or no.\tYes\nIs it night?  Please answer yes or no.\tNo"),
        },
        "code_reasoning": {
            "0020": ("Is it 3? Please answer yes or no.\tNo\nIs it 4? Please answer yes or no.\tYes\n")
        },
    }
    for task, files in flat.items():
        (root / task).mkdir(parents=True)
        for name, text in files.items():
            (root / task / f"{name}.txt").write_text(text)
            (root / task / f"{name}.{'png' if task == 'code_reasoning' else 'jpg'}").write_bytes(png())
    (root / "posters" / "images").mkdir(parents=True)
    (root / "posters" / "questions_answers_YN").mkdir()
    (root / "posters" / "images" / "tt01.jpg").write_bytes(png())
    (root / "posters" / "questions_answers_YN" / "tt01.txt").write_text(
        'Is it "Amélie"? Please answer yes or no.\tYes\nIs it a war film? Please answer yes or no.\tNo\n'
    )
    return folder


def mme_parquet(folder: Path) -> Path:
    rows = [
        {
            "question_id": f"{task}/1.png",
            "image": cell(1),
            "question": f"{q} Please answer yes or no.",
            "answer": a,
            "category": task,
        }
        for task in ("existence", "OCR")
        for q, a in (("Is it red?", "Yes"), ("Is it blue?", "No"))
    ]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return folder


MMBENCH_HEADER = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]
MMBENCH_QUESTIONS = [
    # index, question, hint, options, answer, category, level 2
    (
        241,
        'Which "one"\nis it?',
        "Look\nhere.",
        ["cat", "a dog", "bird", "None of these"],
        1,
        "ocr",
        "coarse",
    ),
    (252, "Pick.", "", ["red", "blue"], 0, "color", "coarse"),
]


def mmbench_rows() -> list[dict]:
    """All rotations of the questions, as the files have them."""
    rows = []
    for index, question, hint, options, answer, category, level2 in MMBENCH_QUESTIONS:
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            letters = dict(zip("ABCD", turned + [""] * (4 - len(turned)), strict=True))
            rows.append(
                {
                    "index": str(index + turn * 1_000_000),
                    "question": question,
                    "hint": hint,
                    **letters,
                    "answer": "ABCD"[turned.index(options[answer])],
                    "category": category,
                    "image": base64.b64encode(png(index)).decode(),
                    "source": "x",
                    "l2-category": level2,
                    "comment": "",
                    "split": "dev",
                }
            )
    return rows


def write_table(path: Path, rows: list[dict], header: list[str] = MMBENCH_HEADER) -> None:
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mmbench(folder: Path) -> Path:
    write_table(folder / "mmbench_dev_20230712.tsv", mmbench_rows())
    return folder


def mmbench_new_table(folder: Path) -> Path:
    """One image a group: the copies hold the index of their base row."""
    rows = sorted(mmbench_rows(), key=lambda row: int(row["index"]))
    for row in rows:
        if int(row["index"]) >= 1_000_000:
            row["image"] = str(int(row["index"]) % 1_000_000)
    write_table(folder / "MMBench_DEV_EN.tsv", rows)
    return folder


def mmbench_parquet(folder: Path) -> Path:
    rows = []
    for row in mmbench_rows():
        level2 = row.pop("l2-category")
        rows.append(
            {**row, "index": int(row["index"]), "L2-category": level2, "image": cell(int(row["index"]) % 9)}
        )
    write_parquet(folder / "data" / "dev-00000-of-00001.parquet", rows)
    return folder


MMVET = {
    "v1_0": {
        "imagename": "v1_0.png",
        "question": "What is x in the equation?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
        "imagesource": "u",
    },
    "v1_1": {
        "imagename": "v1_1.png",
        "question": "Who?",
        "answer": "Zoë<OR>a girl",
        "capability": ["rec"],
        "imagesource": "u",
    },
    "v1_2": {
        "imagename": "v1_0.png",
        "question": "Read it.",
        "answer": "abc",
        "capability": ["math", "ocr"],
        "imagesource": "u",
    },
}


def mmvet(folder: Path) -> Path:
    write_json(folder / "mm-vet" / "mm-vet.json", MMVET)
    (folder / "mm-vet_evaluator.py").write_text(
        'import sys\nprompt = """Stand-in instruction.\n\nQuestion | Correctness\n"""\n\n'
        'def run(prompt=prompt):\n    again = prompt + "\\nStand-in second line (digit): "\n'
    )
    return folder


def mmvet_parquet(folder: Path) -> Path:
    rows = [
        {
            "question_id": question_id,
            "question": one["question"],
            "answer": one["answer"],
            "image": cell(n),
            "capability": ",".join(one["capability"]),
        }
        for n, (question_id, one) in enumerate(MMVET.items())
    ]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return folder


def llava_w(folder: Path) -> Path:
    kinds = ["conv", "detail", "complex", "conv"]
    write_lines(
        folder / "questions.jsonl",
        [
            {"question_id": n, "image": f"00{1 + n // 2}.jpg", "text": f"Question {n}?", "category": kind}
            for n, kind in enumerate(kinds)
        ],
    )
    write_lines(
        folder / "context.jsonl",
        [
            {"id": "001", "image": "001.jpg", "caption": "One caption."},
            {"id": "002", "image": "002.jpg", "caption": ["First.", "Second."]},
        ],
    )
    answers = [{"question_id": n, "text": f"Reference {n}.", "answer_id": str(n)} for n in range(len(kinds))]
    write_lines(folder / "answers_gpt4.jsonl", answers)
    rules = {f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"Rule {kind}."} for kind in set(kinds)}
    write_json(folder / "rule.json", rules)
    (folder / "eval_gpt_review_bench.py").write_text(
        "def ask(content):\n    return [{'role': 'system', 'content': 'Stand-in system line.'},\n"
        "            {'role': 'user', 'content': content}]\n"
    )
    return folder


def llava_w_parquet(folder: Path) -> Path:
    rows = [
        {
            "question_id": n,
            "question": f"Question {n}?",
            "image": cell(n),
            "category": "conv",
            "image_id": "001.jpg",
            "gpt_answer": "Ref.",
            "caption": ["First.", "Second."],
        }
        for n in range(2)
    ]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
    return folder
