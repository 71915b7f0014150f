"""Names and words of the generated training text, and random values made of them.

No word is in the lists of the evaluation tasks (`dms_jax.tasks.words`), and no random number has five digits as theirs
do, so that training on the generated text does not teach the answers of an evaluation.
"""

import random
import string
import uuid
from collections.abc import Sequence
from typing import NamedTuple

GIVEN_NAMES = tuple(
    """
    Abena Adela Alba Alvaro Amina Anouk Arjun Astrid Beatriz Benno Bianca Caleb Carmen Cedric Chidi Clara Dalia Darius
    Delphine Dmitri Edda Elif Emeka Enzo Esther Fatima Felix Fiona Freya Gareth Gita Goran Greta Hamid Hanna Hector
    Hiro Ida Ines Ingrid Ismael Ivana Jasper Jelena Joaquin Kaito Kamala Karim Katya Kofi Lars Leila Leonor Linus
    Lorenzo Luca Magda Malik Marta Matteo Mei Mirela Nadia Naomi Nikhil Nora Octavia Odile Olek Omar Petra Priya
    Quentin Rafael Ramona Rohan Rosa Samira Selma Simon Sofia Stefan Sunita Tamar Tariq Tessa Tomas Ulrich Una Valeria
    Viktor Wanda Yara Yusuf Zelda Zoran
    """.split()  # noqa: SIM905  # a list of so many strings would be unreadable
)
SURNAMES = tuple(
    """
    Abara Adeyemi Albrecht Almeida Anand Arslan Bakshi Barros Bellamy Bergstrom Bianchi Calloway Castellan Chatterjee
    Cordova Crane Dahl Dalgaard Delacroix Desai Drummond Duarte Eastman Ekström Eriksen Falk Farouk Ferreira Fontaine
    Galloway Garza Gupta Haddad Halloran Hartwell Hassan Holloway Ibarra Ishikawa Ivanov Jansen Jimenez Kapoor Keller
    Kimura Kovacs Kruger Lindqvist Lombardi Lovell Maddox Marchetti Mbeki Mendoza Moreau Nakamura Navarro Nilsson
    Nwosu Okafor Oliveira Ortega Osman Palmer Pavlov Pereira Petrov Quill Ramirez Rasmussen Reyes Rinaldi Romero Rossi
    Sandoval Santos Sato Schreiber Serrano Sharma Sorensen Stavros Tanaka Thackeray Thorne Valdez Vargas Vasquez Verma
    Volkov Wachter Whitlock Winslow Yamada Zeller Zimmer
    """.split()  # noqa: SIM905
)
TOWNS = tuple(
    """
    Aldermoor Amberley Ansbach Arkwell Ashgrove Aveiro Bayreuth Bellhaven Bergamo Blackwater Bramford Brightsea Calder
    Cascais Castelmar Coldbrook Coimbra Corrigan Cranmere Dellwick Dunmore Eastmere Elmshorn Esbjerg Fairhollow
    Fernleigh Foxglen Galway Girona Glenrock Gorlitz Greyport Halden Harrowgate Hexham Highcliff Inverness Jena
    Karlstad Kestrel Kilmarn Lakonia Larkspur Leiria Lindau Lublin Lynmouth Maidstone Marwick Millhaven Modena Northam
    Oakhurst Odense Orvieto Ostrava Pellworth Pinecrest Porvoo Quimper Ravensburg Redcliff Rosslyn Saltash Segovia
    Silverton Skagen Stonebridge Tartu Tavira Thornbury Trieste Uppsala Utrecht Vellmar Viborg Viseu Westmoor Whitby
    Wismar Yarrow Zadar Zwolle
    """.split()  # noqa: SIM905
)
THINGS = tuple(
    """
    accordion almanac anchor anvil apron armchair atlas backpack badge bagel barometer barrel beacon bicycle binder
    biscuit blender bonnet bracelet briefcase brooch buckle cactus calculator canoe canvas cardigan carousel cello
    cabinet chalk chandelier charger chess chimney chisel cider cinnamon clarinet compass cookie copper cradle crate
    crayon cricket crystal cushion cymbal dagger decanter dial diary dictionary drawer drill easel elevator envelope
    fiddle filter flask flute folder funnel gadget gazebo ginger glider globe goggles gramophone granite gravel grill
    hammock harness harp hatchet helmet herb hinge honey hoop inkwell ivory jar jersey jigsaw kayak kennel ketchup
    kite ladle lantern lapel lasso lavender ledger lentil lever linen locket loom magnet mallet mandolin mango mantle
    marble medal microscope mitten mosaic motor mug muffin napkin notebook nutmeg oar oven paddle padlock pamphlet
    pancake parasol parcel parrot pebble pendant pigeon pillow plank plow pumpkin puppet puzzle quill quilt radio raft
    rake razor receipt rocket rudder rug saddle sandal satchel saucer saxophone scarf scissors scooter shelf shovel
    sickle skate sketch sled sleeve slipper sponge stamp statue stool suitcase sundial tambourine tapestry teapot
    telescope thimble thread ticket timber toaster tripod trophy trumpet tugboat tulip tunnel turban turnip umbrella
    urn valve vase vest vinegar waffle wallet walnut whistle wicker windmill wrench yarn yogurt zipper
    """.split()  # noqa: SIM905
)
QUALITIES = tuple(
    """
    agile ample arctic austere balmy beige bouncy brisk burly candid carved chilly coarse compact cozy crimson dainty
    dapper dense devout dim dreamy durable earnest elastic elegant exotic faded feisty festive fluffy fond frosty
    frugal gaudy glossy graceful grim gritty hardy hasty hazy hearty hoarse humid indigo jagged keen lanky lavish
    lofty lucid lush magenta marbled mellow merry mild-mannered mossy murky nimble oblong ornate oval padded painted
    peppery placid polished portable prickly pristine quaint rugged rustic sandy scarlet shaggy sleek slender snug
    solemn sparse spicy spotless spry stately sturdy subtle supple swift tangy tepid thorny tidal timid tranquil
    turquoise upbeat velvet vivid wary wiry witty wobbly woolen zesty
    """.split()  # noqa: SIM905
)
TRADES = tuple(
    """
    archivist bookbinder botanist brewer bricklayer carpenter cartographer chemist choirmaster clockmaker cobbler
    conductor cooper dentist economist editor electrician engraver florist gardener geologist glassblower goldsmith
    historian illustrator journalist librarian linguist locksmith mason mechanic midwife miller navigator optician
    organist pharmacist philosopher photographer plumber potter printer publisher sculptor shepherd stonemason
    surveyor tailor translator typesetter upholsterer veterinarian violinist weaver welder zoologist
    """.split()  # noqa: SIM905
)
MONTHS = tuple("January February March April May June July August September October November December".split())  # noqa: SIM905


class Person(NamedTuple):
    given: str
    surname: str

    def __str__(self) -> str:
        return f"{self.given} {self.surname}"


def persons(rng: random.Random, count: int) -> list[Person]:
    """Draw people no two of whom share a name."""
    return [Person(*names) for names in zip(rng.sample(GIVEN_NAMES, count), rng.sample(SURNAMES, count), strict=True)]


def labels(rng: random.Random, count: int) -> list[str]:
    """Draw different labels of two words, such as "sturdy lantern"."""
    return [f"{rng.choice(QUALITIES)} {thing}" for thing in rng.sample(THINGS, count)]


def digits(rng: random.Random, length: int = 0) -> str:
    """Draw a number of `length` digits; 0 stands for 4, 6 or 7."""
    length = length or rng.choice((4, 6, 7))
    return str(rng.randrange(10 ** (length - 1), 10**length))


def code_word(rng: random.Random) -> str:
    """Draw a code such as "TK-4471-RB"."""
    letters = rng.choices(string.ascii_uppercase, k=4)
    return f"{letters[0]}{letters[1]}-{digits(rng, 4)}-{letters[2]}{letters[3]}"


def unique_id(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def day(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1840, 2015)}"


def telephone(rng: random.Random) -> str:
    return f"{rng.randint(201, 989)}-{rng.randint(201, 989)}-{digits(rng, 4)}"


def price(rng: random.Random) -> str:
    return f"${rng.randint(3, 480)}.{rng.randint(0, 99):02}"


def with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def listing(items: Sequence[object]) -> str:
    """Join items as in a sentence: "a, b and c"."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
