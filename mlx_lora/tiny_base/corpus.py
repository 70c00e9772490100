"""The training data of the tiny base: short everyday English, made by templates from word lists, with seeds.

``documents(seed)`` yields an endless stream of chats (``{"messages": [...]}``) and stories (``{"text": ...}``). Two in
five nouns and names are made up, so that a model has to read and copy them instead of knowing them. There are no
structured records: they are the task that an adapter learns, see ``skill.py``. Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words("""
Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olive Paul Queenie Rosa Sam Tessa Umar Vera
Will Xenia Yusuf Zoe Alice Bruno Carmen Daisy Edgar Fatima George Hanna Ivan Julia Karl Lily Marco Nina Oscar Petra
Rahul Sofia Tom Ursula Victor Wanda Amir Bella Chen Dora Elias Flora Gwen Hugo Ida Jonas Kim Lena Max Nora Omar Pia
Robin Sara Theo Lucy Mark Ruth Peter Maria Adam Eva
""")
ITEMS = _words("""
kite ball book cup hat coat bag box key lamp ring rope drum flute bell boat bike cart chair clock comb fork spoon
plate bowl basket blanket pillow candle mirror brush bucket broom shovel hammer ladder wheel stone shell feather leaf
flower apple pear lemon orange plum cherry carrot onion potato pumpkin bread cake cookie cheese egg jar bottle glass
kettle pot pan scarf glove sock shoe boot belt shirt dress button needle thread map letter stamp coin pencil pen ruler
puzzle doll robot train truck car plane violin guitar piano trumpet umbrella suitcase phone camera radio watch wallet
ticket notebook lantern flag tent helmet skate sled marble whistle
""")
COLOURS = _words("""
red blue green yellow white black brown pink purple grey orange golden silver violet beige crimson turquoise scarlet
teal ivory
""")
PLACES = _words("""
park garden kitchen school library market station harbour forest beach river lake bridge tower castle barn field
meadow village museum theatre cinema hotel office bakery church cellar attic hall gym shop cafe bus tram train
playground stable mill cave island yard street square airport zoo pool workshop studio bedroom bathroom hospital farm
orchard valley temple
""")
ANIMALS = _words("""
cat dog fox bear owl hen duck goose horse cow goat sheep pig mouse rabbit frog toad snail bee ant fish whale seal wolf
deer crow robin swan pony donkey camel lion tiger monkey
""")
FOODS = _words("apple pear lemon plum cherry carrot onion potato pumpkin bread cake cookie cheese egg soup rice")
NUMBERS = _words("""
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
""")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MOODS = _words("happy sad tired hungry cold lonely brave curious proud sleepy")
OPPOSITES = [
    pair.split("/")
    for pair in _words("""
big/small hot/cold day/night up/down happy/sad fast/slow old/young open/closed full/empty light/dark wet/dry
loud/quiet high/low soft/hard rich/poor early/late near/far clean/dirty left/right long/short thick/thin strong/weak
good/bad new/old sweet/sour first/last black/white yes/no in/out begin/end
""")
]
ONSETS = _words("b c d f g h j k l m n p r s t v w z bl br cl dr fl gr kr pl pr sk sl sn st tr")


def article(word: str) -> str:
    """``word`` with its indefinite article."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def invented(rng: random.Random) -> str:
    """A made-up word of one to three syllables, such as ``blonk`` or ``tarivo``."""
    word = "".join(rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    end = rng.choice(["", "", "b", "d", "k", "l", "m", "n", "nk", "p", "r", "rn", "s", "st", "t", "x"])
    return word + (end or ("l" if len(word) < 3 else ""))


def pick(rng: random.Random, words: list[str], made_up: float = 0.4) -> str:
    """A word of the list or, with the probability ``made_up``, an invented one; capitalised like the list."""
    if rng.random() < made_up:
        word = invented(rng)
        return word.capitalize() if words[0][0].isupper() else word
    return rng.choice(words)


class Fact(NamedTuple):
    """A person's coloured thing in a place. Most of the questions are about one."""

    name: str
    item: str
    colour: str
    place: str

    @classmethod
    def draw(cls, rng: random.Random) -> Fact:
        return cls(pick(rng, NAMES), pick(rng, ITEMS), pick(rng, COLOURS, 0.1), pick(rng, PLACES))

    def sentence(self, rng: random.Random) -> str:
        name, item, colour, place = self
        thing = article(f"{colour} {item}")
        return rng.choice(
            [
                f"{name} has {thing} in the {place}.",
                f"{name} saw {thing} at the {place}.",
                f"{name} put {thing} in the {place}.",
                f"There is {thing} in the {place}. It belongs to {name}.",
                f"In the {place}, {name} found {thing}.",
                f"The {colour} {item} in the {place} is for {name}.",
                f"{name} is in the {place} with {thing}.",
                f"{name} went to the {place}. There {name} lost {thing}.",
                f"My name is {name}. I have {thing}. It is in the {place}.",
                f"Look at the {place}! You can see {thing} there. {name} made it.",
            ]
        )

    def questions(self) -> list[tuple[str, str]]:
        name, item, colour, place = self
        thing = article(f"{colour} {item}")
        return [
            (f"What colour is the {item}?", f"The {item} is {colour}."),
            (f"Where is the {item}?", f"The {item} is in the {place}."),
            (f"Whose {item} is it?", f"It is the {item} of {name}."),
            (f"Who has the {item}?", f"{name} has the {item}."),
            (f"What does {name} have?", f"{name} has {thing}."),
            (f"What is in the {place}?", f"There is {thing} in the {place}."),
            (f"Where is {name}?", f"{name} is in the {place}."),
        ]

    def fields(self) -> list[tuple[str, str]]:
        return [("name", self.name), ("thing", self.item), ("colour", self.colour), ("place", self.place)]


Turns = list[str]  # user, assistant, user, assistant ...


def reading(rng: random.Random) -> Turns:
    """One to three facts, then one or two questions about them."""
    facts = [Fact.draw(rng) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    text = " ".join(fact.sentence(rng) for fact in facts)
    questions = [question for fact in facts for question in fact.questions()]
    (first, answer), (second, other) = rng.sample(questions, 2)
    start = f"{text} {first}" if rng.random() < 0.8 else f"{first} {text}"
    return [start, answer, second, other] if rng.random() < 0.4 else [start, answer]


def one_word(rng: random.Random) -> Turns:
    """A fact, then a request for one or two of its words, with or without quotes."""
    fact = Fact.draw(rng)
    text = fact.sentence(rng)
    (key, value), (key2, value2) = rng.sample(fact.fields(), 2)
    return rng.choice(
        [
            [f"{text} Say only the {key}.", f"{value}"],
            [f"{text} Say the {key} in quotes.", f'"{value}"'],
            [f"{text} Say the {key} and the {key2}.", f"{value}, {value2}"],
            [f"{text} Say the {key} and the {key2} in quotes.", f'"{value}", "{value2}"'],
            [f"{text} Which is the {key}?", f"The {key} is {value}."],
        ]
    )


def yes_no(rng: random.Random) -> Turns:
    fact = Fact.draw(rng)
    text = fact.sentence(rng)
    colour = rng.choice(COLOURS) if rng.random() < 0.5 else fact.colour
    same = colour == fact.colour
    return [
        f"{text} Is the {fact.item} {colour}?",
        f"Yes, the {fact.item} is {colour}." if same else f"No, the {fact.item} is {fact.colour}, not {colour}.",
    ]


def remark(rng: random.Random) -> Turns:
    """A statement without a question: the reply repeats it in friendly words."""
    fact = Fact.draw(rng)
    name, item, colour, place = fact
    reply = rng.choice(
        [
            f"How nice! {name} and a {item} in the {place}.",
            f"I see. The {item} is {colour}.",
            f"Thank you. I will look for the {colour} {item} in the {place}.",
            f"Oh, {article(f'{colour} {item}')}! Say hello to {name}.",
        ]
    )
    return [fact.sentence(rng), reply]


def copying(rng: random.Random) -> Turns:
    """Words to repeat: unchanged, in brackets or quotes, in another order, twice, only the first or the last."""
    words = [pick(rng, rng.choice([ITEMS, PLACES, NAMES, ANIMALS]), 0.6) for _ in range(rng.randint(2, 4))]
    line, one, two = " ".join(words), words[0], words[1]
    left, right = rng.choice(["()", "[]", "{}", '""'])
    mark = {"(": "round brackets", "[": "square brackets", "{": "braces", '"': "quotes"}[left]
    sign = rng.choice([",", ";", ":", "-", "/", "="])
    return rng.choice(
        [
            [f"Say {one}.", f"{one}"],
            [f"Repeat after me: {line}.", f"{line}."],
            [f"Say {one} twice.", f"{one} {one}"],
            [f"Put {one} in {mark}.", f"{left}{one}{right}"],
            [f"Put {one} and {two} in quotes.", f'"{one}" and "{two}"'],
            [f"Put these words in quotes: {line}.", ", ".join(f'"{word}"' for word in words)],
            [f"Put {sign} between {one} and {two}.", f"{one}{sign} {two}"],
            [f"What is the first word? {line}", f"The first word is {one}."],
            [f"What is the last word? {line}", f"The last word is {words[-1]}."],
            [f"Say it backwards: {line}", " ".join(reversed(words))],
            [f"Which word comes after {one}? {line}", f"After {one} comes {two}."],
            [f"How many words are there? {line}", f"There are {NUMBERS[len(words) - 1]} words."],
        ]
    )


def changing(rng: random.Random) -> Turns:
    fact = Fact.draw(rng)
    field, words = rng.choice([("name", NAMES), ("item", ITEMS), ("colour", COLOURS), ("place", PLACES)])
    new = pick(rng, words, 0.3)
    changed = fact._replace(**{field: new})
    state = rng.getstate()
    before = fact.sentence(rng)
    rng.setstate(state)
    return [f"Change {getattr(fact, field)} to {new}: {before}", changed.sentence(rng)]


def counting(rng: random.Random) -> Turns:
    n, thing = rng.randint(2, 18), pick(rng, ITEMS)
    top = rng.randint(2, 10)
    return rng.choice(
        [
            [f"Count to {NUMBERS[top - 1]}.", ", ".join(NUMBERS[:top]) + "."],
            [f"What comes after {NUMBERS[n]}?", f"After {NUMBERS[n]} comes {NUMBERS[n + 1]}."],
            [f"What comes before {NUMBERS[n]}?", f"Before {NUMBERS[n]} comes {NUMBERS[n - 1]}."],
            [f"Write {NUMBERS[n]} as a number.", f"{n + 1}"],
            [f"Write {n + 1} in letters.", NUMBERS[n]],
            [f"I had {NUMBERS[n]} of them and found one more {thing}. How many?", f"You have {NUMBERS[n + 1]} now."],
            [f"What day comes after {DAYS[n % 7]}?", f"After {DAYS[n % 7]} comes {DAYS[(n + 1) % 7]}."],
        ]
    )


def knowing(rng: random.Random) -> Turns:
    """Small facts that must be known: opposites, kinds of things."""
    one, two = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        one, two = two, one
    kinds = [("an animal", ANIMALS), ("a colour", COLOURS), ("food", FOODS), ("a place", PLACES[:50]), ("a day", DAYS)]
    kind, words = rng.choice(kinds)
    word = rng.choice(words)
    return rng.choice(
        [
            [f"What is the opposite of {one}?", f"The opposite of {one} is {two}."],
            [f"If it is not {one}, what is it?", f"Then it is {two}."],
            [f"What is {word}?", f"{word[0].upper()}{word[1:]} is {kind}."],
            [f"Name {kind}.", f"{word[0].upper()}{word[1:]} is {kind}."],
        ]
    )


def greeting(rng: random.Random) -> Turns:
    name, mood = pick(rng, NAMES), rng.choice(MOODS)
    hello = rng.choice(["Hello", "Hi", "Good morning", "Good evening"])
    return rng.choice(
        [
            [f"{hello}!", f"{hello}! How can I help you?"],
            [f"{hello}, I am {name}.", f"{hello}, {name}! How are you?", "What is my name?", f"Your name is {name}."],
            [
                f"{hello}, my name is {name}.",
                f"{hello}, {name}! How are you?",
                f"I am {mood}.",
                f"You are {mood}. I see.",
            ],
            ["Who are you?", "I am a very small language model. I can read and repeat."],
            ["How are you?", "I am fine, thank you. How are you?"],
            [f"Thank you! Bye from {name}.", f"You are welcome. Goodbye, {name}!"],
            [f"{name} is {mood}. How is {name}?", f"{name} is {mood}."],
        ]
    )


def tale(rng: random.Random, hero: str, name: str) -> str:
    """A story of five to seven sentences about an animal."""
    fact = Fact.draw(rng)
    mood, day = rng.choice(MOODS), rng.choice(DAYS)
    weather = ["It was hot.", "It was late.", "The sun was out."]
    thing = f"{fact.colour} {fact.item}"
    end = rng.choice(
        [
            f"{name} took it home and was not {mood} any more.",
            f"{name} gave it to {fact.name}. They were friends from that day.",
            f'"Is this your {fact.item}?" said {name}. "Yes!" said {fact.name}. "Thank you!"',
        ]
    )
    return (
        f"Once there was {article(hero)}. The {hero} was called {name}. {name} was {mood}. "
        f"One {day}, {name} went to the {fact.place}. {rng.choice(weather)} "
        f"There the {hero} found {article(thing)}. It belonged to {fact.name}. {end}"
    )


def story(rng: random.Random) -> Turns:
    hero, name = rng.choice(ANIMALS), pick(rng, NAMES)
    if rng.random() < 0.4:
        return [f"Tell me a story about {article(hero)}.", tale(rng, hero, name)]
    return [f"Tell me a story about {article(hero)} called {name}.", tale(rng, hero, name)]


KINDS: list[tuple[Callable[[random.Random], Turns], int]] = [
    (reading, 30),
    (one_word, 18),
    (copying, 18),
    (changing, 6),
    (yes_no, 5),
    (remark, 6),
    (counting, 4),
    (knowing, 4),
    (greeting, 4),
    (story, 3),
]
SYSTEMS = ["You are a helpful friend.", "You are a small model. Answer in one sentence.", "Be kind and short."]


def documents(seed: int) -> Iterator[dict]:
    """An endless stream of chats and, one in forty, stories; the same for the same seed."""
    rng = random.Random(f"tiny-base-{seed}")
    makers, weights = zip(*KINDS, strict=True)
    while True:
        if rng.random() < 0.025:
            yield {"text": tale(rng, rng.choice(ANIMALS), pick(rng, NAMES))}
            continue
        turns = rng.choices(makers, weights)[0](rng)
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        if rng.random() < 0.05:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
        yield {"messages": messages}
