"""Items of our own in the schemas of the full suite's eleven tasks, a few each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _arc(question: str, choices: list[str], answer: int) -> dict[str, Any]:
    labels = ["A", "B", "C", "D", "E"][: len(choices)]
    return {
        "id": question[:9],
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[answer],
    }


ARC = [
    _arc("What melts in the sun?", ["a snowman", "a brick", "a coin"], 0),
    _arc("Which of these gives light?", ["a stone", "a candle", "a spoon", "a shoe"], 1),
    _arc("What does a cow give?", ["oil", "ink", "milk", "wool", "sand"], 2),
]

ITEMS: dict[str, list[dict[str, Any]]] = {
    "wikitext/test": [
        {"page": " = A river = \n \n The river is 40 @.@ 5 km long . It ends in a lake . \n"},
        {"page": " = A hill = \n \n The hill 's top is bare . " + "Sheep graze on it . " * 60 + "\n"},
    ],
    "lambada_openai/test": [
        {"text": "She opened the box, and in the box lay a smaller box. So she opened the smaller box"},
        {"text": "The train was late again. Nobody on the platform was surprised, for it was always late"},
        {"text": "He counted the sheep. " * 60 + "At last he had counted all the sheep"},
    ],
    "hellaswag/validation": [
        {
            "ind": index,
            "activity_label": "Making tea",
            "ctx_a": "A man fills a kettle.",
            "ctx_b": "he",
            "ctx": "A man fills a kettle. he",
            "endings": ["boils the water.", "eats the kettle.", "paints it blue [title].", "sings to the cup."],
            "source_id": "ours",
            "split": "val",
            "split_type": "indomain",
            "label": label,
        }
        for index, label in enumerate(("0", "2"))
    ],
    "arc_easy/test": ARC,
    # Never scored, as there is a test split.
    "arc_easy/validation": ARC[:1],
    "arc_challenge/test": ARC[::-1],
    "openbookqa/test": [
        {
            "id": item["id"],
            "question_stem": item["question"],
            "choices": item["choices"],
            "answerKey": item["answerKey"],
        }
        for item in ARC
    ],
    "sciq/validation": [
        {
            "question": "What do plants breathe in?",
            "distractor1": "iron",
            "distractor2": "helium",
            "distractor3": distractor,
            "correct_answer": "carbon dioxide",
            "support": support,
        }
        for distractor, support in (("salt", ""), ("sugar", "Plants take carbon dioxide from the air."))
    ],
    "boolq/validation": [
        {"question": "is the shop open on mondays", "passage": "The shop is shut on Mondays.", "idx": 0, "label": 0},
        {"question": "is the shop shut on mondays", "passage": "The shop is shut on Mondays.", "idx": 1, "label": 1},
        {"question": "is the lake deep", "passage": "The lake is very deep. " * 60, "idx": 2, "label": 1},
    ],
    "piqa/validation": [
        {"goal": "To boil an egg,", "sol1": "put it in hot water.", "sol2": "put it in a sock.", "label": 0},
        {"goal": "To open a jar,", "sol1": "whisper to it.", "sol2": "turn its lid.", "label": 1},
    ],
    "winogrande/validation": [
        {
            "sentence": "The cup broke the tray as _ was heavy.",
            "option1": "the cup",
            "option2": "the tray",
            "answer": "1",
        },
        {"sentence": "Ann paid Eve because _ had worked.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
    "mmlu/test/anatomy": [
        {"question": "How many hearts has a man?", "subject": "anatomy", "choices": list("0123"), "answer": 1},
        {"question": "How many hands has a man?", "subject": "anatomy", "choices": list("0123"), "answer": 2},
        {"question": "How many tails has a man?", "subject": "anatomy", "choices": list("0123"), "answer": 0},
    ],
    "mmlu/test/world_religions": [
        {"question": "Monks live in", "subject": "world_religions", "choices": ["a", "an abbey", "b", "c"], "answer": 1}
    ],
}


def write_items(folder: Path) -> Path:
    """Write them as ``<task>/<split>.jsonl``; returns `folder`."""
    for name, items in ITEMS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder
