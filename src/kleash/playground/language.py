"""The language of the help desk: topics, questions, replies of mixed quality, and a tokenizer.

Everything is said in about 150 words. A question asks for one of eight things; a good reply gives
the three steps of that thing in order and stops. The desk has not always been staffed well: the
replies a policy is supervised on are right a third of the time only (`MIXTURE`).
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

Kind = Literal["right", "partial", "wrong", "vague", "short", "repeated", "mixed"]


@dataclass(frozen=True)
class Topic:
    """Something a customer can ask for, and the three steps that answer it, in order."""

    name: str
    actions: tuple[str, ...]
    """The ways a customer says it, to follow "how do i"."""
    steps: tuple[str, str, str]


@dataclass(frozen=True)
class Question:
    """A prompt as the policy sees it, and what it asks for."""

    text: str
    topic: str


TOPICS: tuple[Topic, ...] = (
    Topic(
        "password",
        ("reset my password", "change my password", "get a new password"),
        ("open the login page", "click on forgot password", "type a new password"),
    ),
    Topic(
        "address",
        ("change my address", "update my address", "correct my address"),
        ("open your profile", "choose edit address", "save the street and city"),
    ),
    Topic(
        "order",
        ("cancel my order", "stop my order", "undo an order"),
        ("go to the order list", "select the last order", "press cancel and confirm"),
    ),
    Topic(
        "parcel",
        ("track my parcel", "find my parcel", "follow a parcel"),
        ("copy the tracking number", "visit the carrier site", "enter the number there"),
    ),
    Topic(
        "shoes",
        ("return my shoes", "send back my shoes", "return a pair of shoes"),
        ("print the return label", "pack the shoes well", "bring the box to the post office"),
    ),
    Topic(
        "invoice",
        ("download my invoice", "get my invoice", "see an invoice"),
        ("go to the billing tab", "pick the right month", "download the file"),
    ),
    Topic(
        "card",
        ("replace my card", "update my card", "use a new card"),
        ("find the payment settings", "remove the old card", "add the new card"),
    ),
    Topic(
        "account",
        ("close my account", "delete my account", "leave the shop"),
        ("save your data", "visit the account settings", "press delete and wait a day"),
    ),
)

GREETINGS: tuple[str, ...] = (
    "",
    "hello ,",
    "good morning ,",
    "please help ,",
    "a quick question :",
)
FRAMES: tuple[str, ...] = (
    "how do i {} ?",
    "how can i {} ?",
    "i want to {} , how ?",
    "what must i do to {} ?",
    "can you tell me how to {} ?",
)
POLITE: tuple[str, ...] = (
    "thank you for asking",
    "you are a valued customer",
    "we are happy to help",
    "have a lovely day",
)
VAGUE: tuple[str, ...] = (
    "please look at the help page",
    "it is quite easy",
    "try again later",
    "ask the help desk",
)
CONNECTIVES: tuple[str, ...] = ("first", "then", "finally")

MIXTURE: dict[Kind, float] = {
    "right": 0.34,
    "partial": 0.18,
    "wrong": 0.14,
    "vague": 0.14,
    "short": 0.06,
    "repeated": 0.07,
    "mixed": 0.07,
}
"""How often the desk gives each kind of reply."""
POLITE_RATE = 0.4
"""Share of replies that hold a polite phrase."""
SECOND_POLITE_RATE = 0.15
"""Share of those that hold a second one."""

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
MAX_WORDS = 48
"""Room for a reply, its end included."""

_BY_NAME = {topic.name: topic for topic in TOPICS}


def topic_named(name: str) -> Topic:
    """The topic of that name.

    Raises:
        KeyError: if there is none.
    """
    return _BY_NAME[name]


def all_questions() -> list[Question]:
    """Every question the language knows: greeting × frame × action, 600 in all.

    >>> len(all_questions()), all_questions()[0]
    (600, Question(text='how do i reset my password ?', topic='password'))
    """
    return [
        Question(f"{greeting} {frame.format(action)}".strip(), topic.name)
        for topic in TOPICS
        for action, frame, greeting in itertools.product(topic.actions, FRAMES, GREETINGS)
    ]


def topic_of(prompt: str) -> Topic:
    """The topic a question asks for, found by its action.

    >>> topic_of("hello , how can i track my parcel ?").name
    'parcel'

    Raises:
        ValueError: if the prompt asks for none, or for more than one.
    """
    words = f" {prompt} "
    found = [t for t in TOPICS if any(f" {action} " in words for action in t.actions)]
    if len(found) != 1:
        raise ValueError(
            f"expected a question of the help desk that asks for one thing, got {prompt!r}, "
            f"which asks for {len(found)}: use the prompts of the embedded world"
        )
    return found[0]


def split_questions(held_out: int, *, seed: int) -> tuple[list[Question], list[Question]]:
    """Shuffle the questions and hold some out, the same number of each topic.

    Args:
        held_out: how many to hold out, a multiple of the number of topics.
        seed: decides which.

    Returns:
        The questions to train on and those held out; no question is in both.

    Raises:
        ValueError: if `held_out` cannot be shared out evenly, or leaves nothing to train on.
    """
    per_topic, rest = divmod(held_out, len(TOPICS))
    questions = all_questions()
    if rest or not 0 < held_out < len(questions):
        raise ValueError(
            f"held_out must be a multiple of {len(TOPICS)} between 0 and {len(questions)}, "
            f"got {held_out}"
        )
    rng = random.Random(f"questions {seed}")
    rng.shuffle(questions)
    kept: list[Question] = []
    held: list[Question] = []
    for topic in TOPICS:
        mine = [question for question in questions if question.topic == topic.name]
        held += mine[:per_topic]
        kept += mine[per_topic:]
    rng.shuffle(kept)
    rng.shuffle(held)
    return kept, held


def write_reply(topic: Topic, rng: random.Random) -> str:
    """A reply as the desk writes it: of a kind drawn from `MIXTURE`, sometimes polite.

    >>> write_reply(topic_named("card"), random.Random(0))
    'have a lovely day . remove the old card .'
    """
    kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
    sentences = _body(kind, topic, rng)
    if rng.random() < POLITE_RATE:
        count = 2 if rng.random() < SECOND_POLITE_RATE else 1
        for phrase in rng.sample(POLITE, count):
            # Politeness opens a reply or closes it.
            sentences = [phrase, *sentences] if rng.random() < 0.5 else [*sentences, phrase]
    return " ".join(f"{sentence} ." for sentence in sentences)


def _body(kind: Kind, topic: Topic, rng: random.Random) -> list[str]:
    """The sentences of one kind of reply, without politeness."""
    steps = list(topic.steps)
    other = rng.choice([t for t in TOPICS if t is not topic])
    match kind:
        case "right":
            return _number(steps)
        case "partial":
            chosen = rng.sample(steps, 2)  # in either order: half of these are out of order
            return _number(chosen)
        case "wrong":
            return _number(list(other.steps))
        case "vague":
            return rng.sample(VAGUE, rng.choice((1, 2)))
        case "short":
            return [rng.choice(steps)]
        case "repeated":
            again = rng.choice(steps)
            place = steps.index(again)
            return _number([*steps[: place + 1], again, *steps[place + 1 :]])
        case "mixed":
            steps[rng.randrange(3)] = rng.choice(other.steps)
            return _number(steps)


def _number(steps: Sequence[str]) -> list[str]:
    """Open the steps with "first", "then" and, the last one, "finally"."""
    last = len(steps) - 1
    openers = ["first" if i == 0 else "finally" if i == last else "then" for i in range(last + 1)]
    return [f"{opener} {step}" for opener, step in zip(openers, steps, strict=True)]


def vocabulary() -> list[str]:
    """Special tokens first, then every word of the language in alphabetical order."""
    texts = [question.text for question in all_questions()]
    texts += [step for topic in TOPICS for step in topic.steps]
    texts += [*POLITE, *VAGUE, *CONNECTIVES, "."]
    return [PAD, BOS, EOS, UNKNOWN, *sorted({word for text in texts for word in text.split()})]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with distinct padding, beginning, end and unknown tokens.

    Encoding puts `<bos>` before the text and no end after it. Punctuation is split off, so that
    a prompt and a reply may be joined with or without a space between them.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.convert_ids_to_tokens(tokenizer("how do i close my account ?").input_ids)
    ['<bos>', 'how', 'do', 'i', 'close', 'my', 'account', '?']
    """
    ids = {word: index for index, word in enumerate(vocabulary())}
    core = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, ids[BOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
