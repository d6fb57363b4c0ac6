"""The questions the demo checkpoint is trained on and examined with.

Every task turns a random *content* (two operands, a list of words, a name, ...) into a chat whose last
answer is known exactly. The content alone decides, by a hash, whether a chat is held out: one content in ten
is never used for training, in no phrasing, so a held-out sum or word list is new to the model in every way of
asking for it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELD_OUT_PERCENT = 10

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One chat with its reference answer.

    Attributes:
        task: name of the task, a key of `TASKS`.
        messages: the conversation so far, ending with the user's question.
        thought: the scratchpad of the answer when thinking is on.
        answer: the exact answer, the same with thinking on and off.
    """

    task: str
    messages: tuple[Message, ...]
    thought: str
    answer: str


@dataclass(frozen=True)
class Turn:
    """A question with its answer, and the content that decides the split (none: always for training)."""

    question: str
    thought: str
    answer: str
    content: str
    history: tuple[Message, ...] = ()


# ----------------------------------------------------------------------------------------------- raw material


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


WORDS = listed("""
apple arrow autumn badge banana basket beach bell bird boat bottle branch bread bridge brush bucket butter
button cabin cable camel candle canyon carpet castle chair cheese cherry circle clock cloud coat copper corn
cotton crown dance desert diamond dragon drum eagle engine evening feather fence field finger flame flower
forest fountain fox frost garden ghost glass glove gold grape guitar hammer harbor hat hill honey horse
hotel house ice island ivory jacket jewel juice jungle kettle king kitten ladder lake lamp leaf lemon letter
lion lizard magnet maple market meadow melon mirror moon mountain mouse museum napkin needle nest night
ocean olive onion orange owl paint palace panda paper peach pearl pencil pepper piano pillow planet pocket
pony potato quartz queen rabbit radio rain ribbon river robot rocket rose sailor salt sand school shadow
shell silver snow spoon spring square star stone storm sugar summer table tiger tower train tulip turtle
valley velvet village violin wagon water whale wheel window winter wolf yellow zebra
""")

REAL_NAMES = listed("""
Ada Alan Alice Amir Anna Ben Carla Chen Clara Daniel David Elena Emma Eva Felix Grace Hana Hugo Ines Ivan
Jack James Jonas Julia Kai Karim Lena Leo Lily Linus Lucas Maria Max Mia Mohamed Nina Noah Nora Olga Omar
Oscar Paul Peter Priya Ravi Rosa Sam Sara Sofia Tom Victor Wei Yuki Zoe
""")
NAME_STARTS = listed("Ma To Li Ka Re No Sa Be Da Ju Mi Pa Ro Vi El An Or Ta Fi Lu")
NAME_MIDDLES = ["", *listed("ra vi lo ni de sha mo ri ta ve lu na ko be")]
NAME_ENDS = listed("ra na el rin dor us lia mas ven tis lo ka")

CITIES = listed("""
Athens Bangkok Berlin Bogota Boston Cairo Chicago Delhi Dublin Geneva Hanoi Helsinki Istanbul Jakarta Kyoto
Lagos Lima Lisbon London Madrid Milan Montreal Mumbai Munich Nairobi Oslo Paris Prague Quito Riga Rome Seoul
Sydney Tokyo Toronto Tunis Venice Vienna Warsaw Zurich
""")
JOBS = listed("baker doctor driver farmer gardener lawyer nurse painter pilot singer teacher writer")
COLORS = listed("red blue green yellow orange purple black white brown pink gray silver gold")
FOODS = listed("pizza soup rice pasta salad curry sushi cake cheese noodles pancakes tacos")
GOODS = listed(
    "apples books bottles boxes candles chairs coats cups eggs hats lamps lemons pencils plates shirts spoons"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
EVENTS = listed("concert dinner exam game interview lecture meeting party picnic workshop")

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are the nanovllm demo model.",
    "Answer briefly and exactly.",
    "You are a helpful, honest assistant. Answer the question.",
]


def random_name(rng: random.Random) -> str:
    """A first name: a common one, or one put together from syllables (so that there are thousands)."""
    if rng.random() < 0.3:
        return rng.choice(REAL_NAMES)
    return rng.choice(NAME_STARTS) + rng.choice(NAME_MIDDLES) + rng.choice(NAME_ENDS)


POLITE_VERBS = listed(
    "Add Calculate Compute Copy Count Extract Fill Find Give Introduce List Make Name Put Repeat Reverse Say "
    "Show Sort Subtract Take Tell Write"
)


def phrase(rng: random.Random, templates: list[str], **values: object) -> str:
    """Fill one of the templates and vary its surface: capitals, final punctuation, a "please"."""
    template = rng.choice(templates)
    text = template.format(**values)
    if template.split()[0] in POLITE_VERBS and rng.random() < 0.1:
        text = "Please " + text[0].lower() + text[1:]
    if template[0] != "{" and rng.random() < 0.25:  # never a name's capital
        text = text[0].lower() + text[1:]
    if text[-1] in ".?" and rng.random() < 0.25:
        text = text[:-1]
    return text


# ------------------------------------------------------------------------------------------------------ tasks

SELF = "I am the nanovllm demo model, a tiny Qwen3 with two million parameters, trained on two CPU cores."
SKILLS = (
    "I can add and subtract, count, sort, list primes, copy or reverse words, fill JSON records and recall "
    "what you told me."
)
INTENTS: dict[str, tuple[list[str], str]] = {
    "who I am": (
        [
            "Introduce yourself.",
            "Who are you?",
            "Tell me about yourself.",
            "What are you?",
            "Can you introduce yourself?",
            "Tell me who you are.",
            "Say something about yourself.",
        ],
        f"{SELF} {SKILLS}",
    ),
    "what I can do": (
        [
            "What can you do?",
            "How can you help me?",
            "Which tasks can you do?",
            "Tell me what you can do.",
            "What are you good at?",
        ],
        SKILLS,
    ),
    "how big I am": (
        [
            "How big are you?",
            "How many parameters do you have?",
            "Tell me how big you are.",
            "What is your size?",
        ],
        "I have two million parameters, about four megabytes. A large model is a thousand times bigger.",
    ),
    "my name": (
        ["What is your name?", "What are you called?", "Tell me your name.", "What should I call you?"],
        "My name is nanovllm demo. I am a tiny Qwen3.",
    ),
}


def introduce(rng: random.Random) -> Turn:
    """Introduce yourself, often to somebody with a name; the name decides the split."""
    topic = rng.choice(["who I am", *INTENTS])
    questions, answer = INTENTS[topic]
    question = phrase(rng, questions)
    if rng.random() < 0.15:
        return Turn(question, f"The user asks {topic}.", f"Hello! {answer}", "")
    name = random_name(rng)
    if rng.random() < 0.15:
        other = random_name(rng)
        name = f"{name} and {other}"
        opening = ["We are {name}.", "Hello, here are {name}.", "This is {name}."]
    else:
        opening = [
            "I am {name}.",
            "My name is {name}.",
            "Hi, I'm {name}.",
            "Hello, my name is {name}.",
            "{name} here.",
            "Hello from {name}.",
            "They call me {name}.",
            "Hi! This is {name}.",
        ]
    said = phrase(rng, opening, name=name)
    if topic == "who I am" and rng.random() < 0.2:
        question = phrase(rng, ["Introduce yourself to {name}.", "Tell {name} who you are."], name=name)
    elif rng.random() < 0.75:
        question = f"{said if said[-1] in '.!' else said + '.'} {question}"
    else:
        question = f"{question if question[-1] in '.?' else question + '.'} {said}"
    return Turn(question, f"The user is {name} and asks {topic}.", f"Hello, {name}! {answer}", name)


def random_number(rng: random.Random) -> int:
    """A number of one to three digits, more often a long one."""
    return rng.randrange(10 ** rng.choice([1, 2, 2, 3, 3, 3]))


def add(rng: random.Random) -> Turn:
    """a + b for numbers up to 999, with the carries written down when thinking."""
    a, b = random_number(rng), random_number(rng)
    templates = [
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "{a} + {b} =",
        "{a} + {b}",
        "How much is {a} plus {b}?",
        "Compute {a} + {b}.",
        "What is the sum of {a} and {b}?",
        "Calculate {a} plus {b}.",
    ]
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x} + {y} + {carry} = {total}")
        carry = total // 10
    return Turn(phrase(rng, templates, a=a, b=b), "\n".join(steps), f"{a} + {b} = {a + b}", f"{a}+{b}")


def subtract(rng: random.Random) -> Turn:
    """a - b for numbers up to 999 with a >= b, with the borrows written down when thinking."""
    b, a = sorted((random_number(rng), random_number(rng)))
    templates = [
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "{a} - {b} =",
        "{a} - {b}",
        "How much is {a} minus {b}?",
        "Compute {a} - {b}.",
        "Take {b} away from {a}.",
        "What is the difference of {a} and {b}?",
    ]
    steps, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        difference = x - y - borrow
        borrowed = int(difference < 0)
        steps.append(f"{x + 10 * borrowed} - {y} - {borrow} = {difference + 10 * borrowed}")
        borrow = borrowed
    return Turn(phrase(rng, templates, a=a, b=b), "\n".join(steps), f"{a} - {b} = {a - b}", f"{a}-{b}")


def count(rng: random.Random) -> Turn:
    """Count up, down or in steps between two numbers, or count the words of a list."""
    kind = rng.choice(["up", "down", "steps", "words"])
    if kind == "words":
        items = rng.sample(WORDS, rng.randint(2, 8))
        content = " ".join(items)
        templates = ["How many words are there: {w}", "Count the words: {w}", "How many words does this list have: {w}"]
        thought = ", ".join(f"{i} {word}" for i, word in enumerate(items, 1))
        return Turn(phrase(rng, templates, w=content), thought, f"There are {len(items)} words.", content)
    step = rng.choice([2, 3, 5, 10]) if kind == "steps" else 1
    low = rng.randint(0, 99)
    numbers = [low + step * i for i in range(rng.randint(3, 12))]
    if kind == "down":
        numbers.reverse()
    templates = {
        "up": ["Count from {a} to {b}.", "Count up from {a} to {b}.", "List the numbers from {a} to {b}."],
        "down": ["Count down from {a} to {b}.", "Count backwards from {a} to {b}.", "Count from {a} down to {b}."],
        "steps": ["Count from {a} to {b} in steps of {s}.", "Count by {s} from {a} to {b}."],
    }[kind]
    first, last = numbers[0], numbers[-1]
    direction = "down" if kind == "down" else "up"
    thought = f"Count {direction} by {step}, start at {first}, stop at {last}."
    question = phrase(rng, templates, a=first, b=last, s=step)
    return Turn(question, thought, ", ".join(map(str, numbers)), f"{first} {last} {step}")


def sort(rng: random.Random) -> Turn:
    """Sort three to six two-digit numbers up or down, or three to five words by their first letters.

    The scratchpad is an insertion sort, one line an item.
    """
    descending = False
    if rng.random() < 0.4:
        letters = rng.sample(sorted({word[0] for word in WORDS}), rng.randint(3, 5))
        items = [rng.choice([word for word in WORDS if word[0] == letter]) for letter in letters]
        keys: dict[str, object] = {word: word for word in items}
        templates = [
            "Sort these words: {x}",
            "Sort alphabetically: {x}",
            "Put these words in alphabetical order: {x}",
        ]
        separator = " "
    else:
        items = [str(n) for n in rng.sample(range(10, 100), rng.randint(3, 6))]
        keys = {item: int(item) for item in items}
        separator = ", "
        descending = rng.random() < 0.4
        if descending:
            templates = [
                "Sort in descending order: {x}",
                "Sort from largest to smallest: {x}",
                "Sort these numbers, largest first: {x}",
            ]
        else:
            templates = [
                "Sort these numbers: {x}",
                "Sort in ascending order: {x}",
                "Sort from smallest to largest: {x}",
                "Put these numbers in order: {x}",
            ]
    steps: list[str] = []
    done: list[str] = []
    for item in items:
        done = sorted([*done, item], key=lambda x: keys[x], reverse=descending)  # type: ignore[arg-type,return-value]
        steps.append(separator.join(done))
    content = separator.join(items)
    return Turn(phrase(rng, templates, x=content), "\n".join(steps), steps[-1], content)


def is_prime(number: int) -> bool:
    """Whether the number is prime, by trial division."""
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


PRIME_QUESTIONS = {
    "up to": [
        "List all prime numbers within {b}.",
        "List the primes up to {b}.",
        "Which prime numbers are there up to {b}?",
        "What are the primes up to {b}?",
        "Name all primes up to {b}.",
        "Show me the primes from 1 to {b}.",
        "Give me all prime numbers not greater than {b}.",
        "List all primes within {b}.",
        "Find every prime number up to {b}.",
        "Write down the prime numbers up to {b}.",
    ],
    "below": [
        "List all prime numbers below {b}.",
        "Which primes are less than {b}?",
        "List the primes smaller than {b}.",
        "Name all primes below {b}.",
        "What are the prime numbers below {b}?",
    ],
    "between": [
        "List the primes from {a} to {b}.",
        "Which prime numbers are between {a} and {b}?",
        "Name all primes from {a} to {b}.",
        "What are the primes between {a} and {b}?",
    ],
}


def primes(rng: random.Random) -> Turn:
    """List the primes up to, below or between limits of at most 200; the limits decide the split."""
    kind = rng.choice(["up to", "up to", "up to", "below", "between", "between", "between", "between"])
    limit = rng.randint(3, 200)
    if rng.random() < 0.15:  # people like to ask for round limits
        limit = rng.choice([10, 20, 50, 100, 100, 100, 150, 200])
    first = rng.randint(2, limit - 1) if kind == "between" else 2
    last = limit - 1 if kind == "below" else limit
    found = [n for n in range(first, last + 1) if is_prime(n)]
    span = f"between {first} and {limit}" if kind == "between" else f"{kind} {limit}"
    if found:
        after = next(n for n in range(last + 1, 2 * last + 2) if is_prime(n))
        thought = f"The last prime is {found[-1]}. The next one, {after}, is too large."
        answer = f"The prime numbers {span}: {', '.join(map(str, found))}."
    else:
        thought = "I know no such prime."
        answer = f"There are no prime numbers {span}."
    # The prompt of example.py is always trained on; the eval asks it apart from the held-out questions.
    content = "" if span == "up to 100" else span
    return Turn(phrase(rng, PRIME_QUESTIONS[kind], a=first, b=limit), thought, answer, content)


def words(rng: random.Random) -> Turn:
    """Copy or reverse a list of words, or repeat one word a number of times."""
    kind = rng.choice(["reverse", "reverse", "copy", "repeat"])
    if kind == "repeat":
        word, times = rng.choice(WORDS), rng.randint(2, 8)
        templates = ["Write the word {w} {n} times.", "Repeat {w} {n} times.", "Say {w} {n} times."]
        thought = ", ".join(f"{i} {word}" for i in range(1, times + 1))
        return Turn(phrase(rng, templates, w=word, n=times), thought, " ".join([word] * times), f"{word} {times}")
    items = rng.sample(WORDS, rng.randint(3, 7))
    text = " ".join(items)
    if kind == "copy":
        templates = [
            "Copy these words: {w}",
            "Repeat these words: {w}",
            "Say after me: {w}",
            "Write the same words again: {w}",
        ]
        thought = f"Same order, {len(items)} words, first {items[0]}, last {items[-1]}."
        return Turn(phrase(rng, templates, w=text), thought, text, text)
    templates = [
        "Reverse these words: {w}",
        "Write these words in reverse order: {w}",
        "Say these words backwards: {w}",
        "Reverse the order of the words: {w}",
    ]
    thought = ", ".join(f"{i} {word}" for i, word in enumerate(items, 1))
    return Turn(phrase(rng, templates, w=text), thought, " ".join(reversed(items)), text)


RECORDS: dict[str, tuple[Callable[[random.Random], dict[str, str | int]], list[str]]] = {
    "person": (
        lambda rng: {
            "name": random_name(rng),
            "age": rng.randint(1, 99),
            "city": rng.choice(CITIES),
            "job": rng.choice(JOBS),
        },
        [
            "{name} is a {job} from {city} and is {age} years old.",
            "{name}, {age}, works as a {job} in {city}.",
            "The {job} {name} lives in {city} and is {age}.",
            "In {city} lives a {age} year old {job} called {name}.",
        ],
    ),
    "order": (
        lambda rng: {
            "customer": random_name(rng),
            "item": rng.choice(GOODS),
            "quantity": rng.randint(2, 99),
            "price": rng.randint(1, 999),
        },
        [
            "{customer} ordered {quantity} {item} for {price} dollars.",
            "We sold {quantity} {item} to {customer} for {price} dollars.",
            "{customer} paid {price} dollars for {quantity} {item}.",
            "For {price} dollars, {customer} bought {quantity} {item}.",
        ],
    ),
    "event": (
        lambda rng: {
            "event": rng.choice(EVENTS),
            "day": rng.choice(DAYS),
            "hour": rng.randint(1, 12),
            "place": rng.choice(CITIES),
        },
        [
            "The {event} is on {day} at {hour} in {place}.",
            "On {day} there is a {event} in {place} at {hour}.",
            "We meet in {place} for the {event} on {day} at {hour}.",
            "The {event} in {place} starts at {hour} on {day}.",
        ],
    ),
}


def fill_json(rng: random.Random) -> Turn:
    """Fill a JSON record whose keys are asked for, in the order asked for, from a sentence."""
    make, sentences = RECORDS[rng.choice(list(RECORDS))]
    values = make(rng)
    sentence = rng.choice(sentences).format(**values)
    keys = rng.sample(list(values), rng.randint(2, 4))
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    templates = [
        "Fill a JSON record with {k}: {s}",
        "Make a JSON record with {k} from this sentence: {s}",
        "Extract {k} as JSON: {s}",
        "{s} Write {k} as JSON.",
        "{s} Fill a JSON record with {k}.",
    ]
    thought = ", ".join(f"{key}: {value}" for key, value in values.items() if key in keys)
    answer = json.dumps({key: values[key] for key in keys})
    return Turn(phrase(rng, templates, k=listed, s=sentence), thought, answer, sentence)


@dataclass(frozen=True)
class Fact:
    """Something a user may tell: how it is said, asked for, and answered."""

    draw: Callable[[random.Random], str]
    said: list[str]
    asked: list[str]
    answer: str


def _pick(values: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


FACTS = [
    Fact(
        random_name,
        ["My name is {x}.", "I am called {x}.", "Hi, my name is {x}."],
        ["What is my name?", "What am I called?", "Do you remember my name?", "Who am I?"],
        "Your name is {x}.",
    ),
    Fact(
        _pick(COLORS),
        ["My favorite color is {x}.", "I like the color {x} best.", "The color I like best is {x}."],
        ["What is my favorite color?", "Which color do I like best?"],
        "Your favorite color is {x}.",
    ),
    Fact(
        _pick(FOODS),
        ["My favorite food is {x}.", "I like to eat {x}.", "I love {x}."],
        ["What is my favorite food?", "What do I like to eat?"],
        "Your favorite food is {x}.",
    ),
    Fact(
        _pick(CITIES),
        ["I live in {x}.", "My home is in {x}.", "I come from {x}."],
        ["Where do I live?", "In which city do I live?"],
        "You live in {x}.",
    ),
    Fact(
        random_name,
        ["My dog is called {x}.", "I have a dog named {x}.", "The name of my dog is {x}."],
        ["What is my dog called?", "What is the name of my dog?"],
        "Your dog is called {x}.",
    ),
    Fact(
        lambda rng: str(rng.randrange(1000)),
        ["My lucky number is {x}.", "Remember the number {x}.", "My number is {x}."],
        ["What is my lucky number?", "Which number did I tell you?", "What was my number?"],
        "Your number is {x}.",
    ),
    Fact(
        lambda rng: rng.choice(WORDS),
        ["The secret word is {x}.", "Remember the word {x}.", "My secret word is {x}."],
        ["What is the secret word?", "Which word did I tell you?", "What was the word?"],
        "The word is {x}.",
    ),
]


def reply_to(fact: Fact, value: str) -> str:
    """What the model says when it is told a fact."""
    if fact is FACTS[0]:
        return f"Nice to meet you, {value}!"
    answer = fact.answer.format(x=value)
    return f"Good to know! {answer}"


def recall(rng: random.Random) -> Turn:
    """Recall one of up to four facts told before, or the first message; the facts decide the split."""
    facts = rng.sample(FACTS, rng.randint(1, 4))
    values = [fact.draw(rng) for fact in facts]
    sayings = [phrase(rng, fact.said, x=value) for fact, value in zip(facts, values, strict=True)]
    replies = [reply_to(fact, value) for fact, value in zip(facts, values, strict=True)]
    turns = list(zip(sayings, replies, strict=True))
    if len(turns) > 1 and rng.random() < 0.3:  # two facts in one message
        joined = f"{sayings[0] if sayings[0][-1] == '.' else sayings[0] + '.'} {sayings[1]}"
        turns[:2] = [(joined, replies[1])]
    if rng.random() < 0.3:
        turns.insert(rng.randrange(len(turns) + 1), rng.choice(SMALL_TALK))
    history = tuple(message for question, answer in turns for message in chat_turn(question, answer))
    content = " ".join(values)
    if rng.random() < 0.12:
        first = turns[0][0]
        question = phrase(rng, ["What did I say first?", "What was my first message?", "Repeat my first message."])
        return Turn(question, "I repeat the first message of the user.", f'You said: "{first}"', content, history)
    chosen = rng.randrange(len(facts))
    question = phrase(rng, facts[chosen].asked)
    answer = facts[chosen].answer.format(x=values[chosen])
    return Turn(question, f"The user told me: {values[chosen]}", answer, content, history)


# ----------------------------------------------------------------------- trained as manners, but not examined

SMALL_TALK = [
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Good morning", "Hello! How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Goodbye", "Goodbye, and thank you for trying me!"),
    ("Bye", "Goodbye, and thank you for trying me!"),
]
CANNOT = f"I am only a tiny demo model and do not know that. {SKILLS}"


def manners(rng: random.Random) -> Turn:
    """Reply to a fact, to small talk, or to a question beyond the model."""
    kind = rng.random()
    if kind < 0.55:
        fact = rng.choice(FACTS)
        value = fact.draw(rng)
        said = phrase(rng, fact.said, x=value)
        return Turn(said, f"The user told me: {value}", reply_to(fact, value), "")
    if kind < 0.7:
        question, answer = rng.choice(SMALL_TALK)
        return Turn(phrase(rng, [question]), "Small talk.", answer, "")
    templates = [
        "What is the capital of {c}?",
        "Tell me a joke about a {w}.",
        "Write a poem about the {w}.",
        "Who was {p}?",
        "Why is the {w} so big?",
        "Translate {w} into French.",
        "What is the meaning of life?",
        "Explain the {w}.",
        "How do I cook {f}?",
        "What is the weather in {c}?",
        "Write a story about {p} and the {w}.",
        "Is a {w} alive?",
        "What does a {w} look like?",
        "When was {p} born?",
        "Write a program that prints {w}.",
        "Who won the game in {c}?",
    ]
    values = {"c": rng.choice(CITIES), "w": rng.choice(WORDS), "p": random_name(rng), "f": rng.choice(FOODS)}
    return Turn(phrase(rng, templates, **values), "This is beyond a tiny model.", CANNOT, "")


# ---------------------------------------------------------------------------------------- examples and splits

TASKS: dict[str, Callable[[random.Random], Turn]] = {
    "introduce": introduce,
    "primes": primes,
    "add": add,
    "subtract": subtract,
    "count": count,
    "sort": sort,
    "words": words,
    "json": fill_json,
    "recall": recall,
}


def is_held_out(task: str, content: str) -> bool:
    """Whether a content is kept for the exam: a hash of task and content, the same on every machine."""
    if not content:
        return False
    digest = hashlib.blake2b(f"{task}: {content}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 100 < HELD_OUT_PERCENT


def chat_turn(question: str, answer: str) -> tuple[Message, Message]:
    """A past exchange as two messages."""
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def make_example(task: str, rng: random.Random, held_out: bool) -> Example:
    """Draw a question of one task from one side of the split.

    Args:
        task: a key of `TASKS`, or "manners" (which has no held-out side).
        rng: the source of all randomness.
        held_out: draw from the held-out contents rather than from the training contents.

    Returns:
        The question, sometimes with a system prompt and an earlier exchange of another kind before it.
    """
    draw = manners if task == "manners" else TASKS[task]
    while True:
        turn = draw(rng)
        if is_held_out(task, turn.content) == held_out:
            break
    messages = [*turn.history, {"role": "user", "content": turn.question}]
    if not turn.history and rng.random() < 0.08:
        earlier = make_example(rng.choice(["add", "words", "count", "manners"]), rng, held_out=False)
        messages[:0] = chat_turn(earlier.messages[-1]["content"], earlier.answer)
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return Example(task, tuple(messages), turn.thought, turn.answer)


def held_out_examples(task: str, number: int, seed: int = 0) -> Iterator[Example]:
    """Yield `number` different held-out questions of one task, the same ones for the same seed."""
    rng = random.Random(f"{task} {seed}")
    seen: set[str] = set()
    while len(seen) < number:
        example = make_example(task, rng, held_out=True)
        key = json.dumps(example.messages)
        if key not in seen:
            seen.add(key)
            yield example
