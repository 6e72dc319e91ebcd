"""Grade-school word problems in the schemas of MetaMathQA and GSM8K, made from a seed.

    python examples/word_problems.py --out out/word_problems --train 4000 --test 500

A problem is a short story: an opening that gives a first number, then one to three events that
change it, then a question. An *easy* problem has one event; it is what the small base model of
``examples/tiny_base`` was pretrained on. A *hard* one has two or three, and its training and test
sets are disjoint twice: no test story is told with a sequence of sentences that a training story
uses, and no test story has the numbers of a training story.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    *("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida"),
    *("Jack", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina"),
)
THINGS = (
    *("apples", "books", "coins", "stamps", "shells", "cards", "marbles", "pencils", "eggs"),
    *("cookies", "stones", "tickets", "buttons", "flowers", "candles", "balls"),
)
# A sentence, and what it does to the number so far. {n}: who, {o}: the things, {k}: a number.
OPENINGS = (
    ("{n} has {k} {o}.", "="),
    ("{n} starts the day with {k} {o}.", "="),
    ("There are {k} {o} in the house of {n}.", "="),
    ("{n} counts {k} {o}.", "="),
    ("On Monday {n} owns {k} {o}.", "="),
    ("A shelf of {n} holds {k} {o}.", "="),
)
EVENTS = (
    ("{n} buys {k} more.", "+"),
    ("{n} finds {k} more {o}.", "+"),
    ("A friend gives {n} {k} {o}.", "+"),
    ("Then {k} {o} are added.", "+"),
    ("{n} loses {k} of them.", "-"),
    ("{n} gives away {k} {o}.", "-"),
    ("{n} sells {k} of the {o}.", "-"),
    ("Then {k} {o} are taken away.", "-"),
    ("The number of {o} grows to {k} times as many.", "*"),
    ("A neighbor brings enough to have {k} times as many {o}.", "*"),
)
QUESTIONS = (
    "How many {o} does {n} have now?",
    "How many {o} are there in the end?",
    "What is the number of {o} now?",
)
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
"""The prompt, as in PEFT's method comparison."""


@dataclass(frozen=True)
class Story:
    """One problem: its sentences by number, and its numbers."""

    opening: int
    events: tuple[int, ...]
    question: int
    numbers: tuple[int, ...]
    name: str
    thing: str

    @property
    def template(self) -> tuple[int, ...]:
        """The sequence of sentences that tell it, without the question."""
        return (self.opening, *self.events)

    def query(self) -> str:
        """The problem in words."""
        words = dict(n=self.name, o=self.thing)
        sentences = [OPENINGS[self.opening][0], *(EVENTS[e][0] for e in self.events)]
        told = [s.format(k=k, **words) for s, k in zip(sentences, self.numbers, strict=True)]
        return " ".join([*told, QUESTIONS[self.question].format(**words)])

    def steps(self) -> list[str]:
        """The calculation, a line for each event."""
        value, lines = self.numbers[0], []
        for event, k in zip(self.events, self.numbers[1:], strict=True):
            sign = EVENTS[event][1]
            after = {"+": value + k, "-": value - k, "*": value * k}[sign]
            lines.append(f"{value} {sign} {k} = {after}")
            value = after
        return lines

    def result(self) -> int:
        """The answer."""
        return int(self.steps()[-1].rsplit(" ", 1)[1])

    def response(self) -> str:
        """The answer as MetaMathQA writes it."""
        return "\n".join(
            [*self.steps(), f"#### {self.result()}", f"The answer is: {self.result()}"]
        )

    def answer(self) -> str:
        """The answer as GSM8K writes it."""
        return "\n".join([*self.steps(), f"#### {self.result()}"])


def _held_out(key: Sequence[object], share: float) -> bool:
    """Whether a key belongs to the test set: by its hash, so that every run agrees."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    return int.from_bytes(digest[:4], "little") < share * 2**32


def _numbers(events: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """Numbers with all intermediate values between 1 and 199."""
    while True:
        times = any(EVENTS[e][1] == "*" for e in events)
        value = rng.randint(2, 25 if times else 60)
        numbers = [value]
        for event in events:
            sign = EVENTS[event][1]
            k = rng.randint(2, 5) if sign == "*" else rng.randint(2, 40)
            value = {"+": value + k, "-": value - k, "*": value * k}[sign]
            numbers.append(k)
            if not 0 < value < 200:
                break
        else:
            return tuple(numbers)


def stories(
    count: int, seed: int, *, events: Sequence[int] = (2, 3), test: bool | None = None
) -> Iterator[Story]:
    """Distinct problems.

    Args:
        count: how many.
        seed: of the choice.
        events: numbers of events to choose from.
        test: True for the test set's templates and numbers, False for the training set's, None for
            no such restriction (easy problems).
    """
    rng, seen = random.Random(f"{seed}/{test}/{tuple(events)}"), set()
    while len(seen) < count:
        chosen = tuple(rng.randrange(len(EVENTS)) for _ in range(rng.choice(list(events))))
        story = Story(
            rng.randrange(len(OPENINGS)),
            chosen,
            rng.randrange(len(QUESTIONS)),
            _numbers(chosen, rng),
            rng.choice(NAMES),
            rng.choice(THINGS),
        )
        if test is not None:
            sides = _held_out(story.template, 0.3), _held_out(story.numbers, 0.3)
            if sides != (test, test):
                continue
        if story not in seen:
            seen.add(story)
            yield story


def metamath_rows(found: Iterator[Story]) -> list[dict[str, str]]:
    """Rows as MetaMathQA has them."""
    return [
        {
            "query": s.query(),
            "response": s.response(),
            "type": f"GSM_{len(s.events)}_events",
            "original_question": s.query(),
        }
        for s in found
    ]


def gsm8k_rows(found: Iterator[Story]) -> list[dict[str, str]]:
    """Rows as GSM8K has them."""
    return [{"question": s.query(), "answer": s.answer()} for s in found]


def pretraining_texts(seed: int) -> Iterator[str]:
    """Endless texts for the base model: easy problems, in two forms, and bare calculations.

    The calculations have up to three steps, so the base can calculate; what it has never seen is a
    story of more than one event.
    """
    for i in itertools.count():
        rng = random.Random(f"{seed}/{i}")
        events = tuple(rng.randrange(len(EVENTS)) for _ in range(rng.randint(1, 3)))
        one = next(stories(1, rng.randrange(2**40), events=(1,)))
        kind = rng.random()
        if kind < 0.45:
            yield f"{TEMPLATE.format(query=one.query())} {one.response()}"
        elif kind < 0.6:
            yield f"{one.query()}\n{one.answer()}"
        else:
            sum_ = Story(0, events, 0, _numbers(events, rng), "", "")
            signs = [EVENTS[e][1] for e in events]
            terms = [f"{sign} {k}" for sign, k in zip(signs, sum_.numbers[1:], strict=True)]
            yield f"Start with {', then '.join([str(sum_.numbers[0]), *terms])}.\n{sum_.answer()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/word_problems"))
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": metamath_rows(stories(args.train, args.seed, test=False)),
        "test": gsm8k_rows(stories(args.test, args.seed, test=True)),
    }
    for name, rows in sets.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows; the first:\n{json.dumps(rows[0], indent=2)}")


if __name__ == "__main__":
    main()
