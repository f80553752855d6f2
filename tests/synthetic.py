"""Made-up rows for the tests, in the schemas of data sets without a clear licence: ShareGPT, SHP and OpenOrca.

The same rows every time. Columns that the data sets do not have say what a row must give; the readers leave them out.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

TOPICS = (
    "tomatoes",
    "the moons of Jupiter",
    "a sourdough starter",
    "bicycle brakes",
    "the year 2023",
    "binary search",
    "alpine huts",
    "violin strings",
    "an index of 3 / 2",
    "tides",
    "beehives",
    "Größe und Gewicht",
)
QUESTIONS = (
    "Explain {} to a child",
    "What should I know about {}?",
    "Write a short poem about {}",
    "List five facts:\n\n- about {}\n- in order",
    "1. Name a book on {}\n2. Say why",
    "is it true that {} is older than 1999",
    "def f(x):\n    return x  # {}",
    "{} 🙂",
    "다음에 대해 알려 주세요: {}",
    "請介紹 {}",
    "{} について教えてください。",
    "Share Prompt ideas about {} in any Language: English, French",
)
# How the page showed a typed text: with its counters, and with labels of the page and of its extensions.
PAGES: tuple[Callable[[str], str], ...] = (
    "{}".format,
    "{}1 / 1".format,
    "{}\n3 / 3\n".format,
    "2 / 3\n{}".format,
    "3 / 3\n{} 2 / 2".format,
    "an earlier draft 1 / 1 {}".format,
    "{}Share Prompt".format,
    "{}1 / 1Share Prompt".format,
    "\n{}\n \n지금 번역하기".format,
    "{} Translate now".format,
    "{}\nLanguage: English".format,
    "{} 2 / 2\nLanguage: 한국어".format,
    "{}\nLanguage: Chinese (Traditional)".format,
    "{}\n2/2".format,
    "~You see a chat with Bing, it is not ChatGPT's~\n{}".format,
)


def sharegpt() -> list[dict[str, Any]]:
    """Conversations as in the sg_90k files, long ones cut into pieces `<id>_<n>`.

    `typed`: the prompt that the conversation must give, or None if there must be none.
    """
    rows: list[dict[str, Any]] = []

    def add(name: str, typed: str | None, *turns: tuple[str, str]) -> None:
        talk = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": name, "conversations": talk, "typed": typed})

    for number, (question, topic) in enumerate(product(QUESTIONS, TOPICS)):
        typed = question.format(topic)
        asked = ("human", PAGES[number % len(PAGES)](typed))
        said, more = ("gpt", f"Here is what I know of {topic}."), ("human", f"And beyond {topic}?")
        if number % 20 == 7:
            add(f"s{number}_0", None, asked)
        elif number % 48 == 11:
            add(f"s{number}_0", None, ("system", "Answer in one sentence."), asked, said)
        else:
            add(f"s{number}_0", typed, asked, said, more, said)
        if number % 2 == 0:
            add(f"s{number}_1", None, said, more, said)
        if number % 24 == 5:  # shared twice, shown once with and once without a counter
            add(f"s{number}x_0", typed, ("human", f"{typed} 1 / 1"), said)
    add("empty_0", None)
    add("blank_0", None, ("human", " \n"), ("gpt", "Yes?"))
    add("counter_0", None, ("human", "1 / 1"), ("gpt", "Yes?"))
    return rows


def shp() -> list[dict[str, Any]]:
    """Pairs of answers as in `stanfordnlp/SHP`."""
    good, bad = "Water it twice a week and keep it near a window.", "No idea, sorry."
    return [
        {
            "post_id": f"p{number}",
            "domain": "synthetic_train",
            "upvote_ratio": 0.9,
            "history": f"How do I keep plant {number} alive?",
            "c_root_id_A": f"a{number}",
            "c_root_id_B": f"b{number}",
            "created_at_utc_A": 1,
            "created_at_utc_B": 2,
            "score_A": 10 + number,
            "score_B": 2,
            "human_ref_A": good if number % 2 else bad,
            "human_ref_B": bad if number % 2 else good,
            "labels": number % 2,
            "seconds_difference": 1.0,
            "score_ratio": 1.0 + number % 4,
        }
        for number in range(60)
    ]


def openorca() -> list[dict[str, Any]]:
    """Questions as in Open-Orca's 1M-GPT4-Augmented.parquet, one in eight on natural language inference.

    `kept`: whether the question must become a prompt.
    """
    questions = (
        ("{}: what is {} + 2?", True),
        ("Translate to German ({} {}): The promises of spring are many.", True),
        ("{} {}. Is the review positive or negative? It was not possible to put the book down.", True),
        ("Premise: bird {1} of {0} sings. Hypothesis: it is silent. Does the premise entail the hypothesis?", False),
        ("{} {}: Q: Which of these melts first? (a) ice (b) iron (c) salt A:", True),
        ("Write a hypothetical letter to house {1} in {0} street.", True),
        ("Here is a list of {1} words of {0}. Sort them: tide, bee, string", True),
        ("{} {}: Summarize in one sentence. The hut is open from June to September.", True),
    )
    return [
        {
            "id": f"{family}.{number}",
            "system_prompt": "You are an AI assistant. Think step by step." if number % 3 else "",
            "question": question.format(family, number),
            "response": "?",
            "kept": kept and family != "dialog",
        }
        for family in ("niv", "flan", "t0", "cot", "dialog")
        for number, (question, kept) in enumerate(questions * 2)
    ]
