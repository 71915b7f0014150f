"""The templates of `word_problems`: a statement, its worked solution, and the numbers in both."""

from collections.abc import Callable
from typing import NamedTuple


class Template(NamedTuple):
    ranges: dict[str, tuple[int, int]]  # smallest and largest value of each number that is drawn
    derived: Callable[..., dict[str, int | str]]  # the numbers that the solution computes, from those drawn
    question: str  # the names {n}, {m}, {k}, {thing} and {town} are drawn too
    solution: str


def money(cents: int) -> str:
    return f"${cents // 100}.{cents % 100:02}"


TEMPLATES = (
    # Addition, subtraction, multiplication and division.
    Template(
        {"a": (3, 24), "b": (4, 30), "c": (2, 40)},
        lambda a, b, c: {"x": a * b, "y": a * b + c},
        "{n} fills {a} boxes with {b} pieces each and has {c} pieces left over. How many pieces does {n} have in all?",
        "The {a} boxes hold {a} * {b} = {x} pieces. With the {c} left over, {n} has {x} + {c} = {y} pieces.",
    ),
    Template(
        {"a": (30, 90), "b": (5, 25), "c": (2, 6)},
        lambda a, b, c: {"g": a * c, "w": b * c, "x": a * c - b * c, "y": a - b},
        "{n} has {g} stickers. {c} friends, one of them {m}, take {b} stickers each. The rest is shared by the {c} "
        "friends. How many more does each friend get?",
        "Together, {c} friends take {c} * {b} = {w} stickers, so {g} - {w} = {x} are left. Shared by {c}, that is "
        "{x} / {c} = {y} stickers each.",
    ),
    Template(
        {"a": (12, 60), "b": (3, 9), "c": (10, 50)},
        lambda a, b, c: {"x": a * b, "y": a * b - c, "z": a + a * b - c},
        "{n} collected {a} shells. {m} collected {b} times as many and gave {c} of them to {k}. "
        "How many shells do {n} and {m} have together now?",
        "{m} collected {b} * {a} = {x} shells and kept {x} - {c} = {y} after giving {c} to {k}. Together with the {a} "
        "shells of {n}, that makes {a} + {y} = {z}.",
    ),
    Template(
        {"a": (4, 15), "b": (6, 20), "c": (3, 12)},
        lambda a, b, c: {"x": a * b, "y": a * b * c},
        "A hall has {a} blocks of {b} rows with {c} seats per row. How many seats are there?",
        "There are {a} * {b} = {x} rows. With {c} seats per row, that is {x} * {c} = {y} seats.",
    ),
    Template(
        {"a": (3, 12), "b": (15, 60), "c": (2, 8)},
        lambda a, b, c: {"x": a * b, "y": a * b * c, "h": f"{a * b * c / 60:.1f}"},
        "{n} practises {a} times a week for {b} minutes. How many minutes are {c} weeks, and about how many hours?",
        "One week has {a} * {b} = {x} minutes. In {c} weeks, that is {c} * {x} = {y} minutes, or about {h} hours.",
    ),
    Template(
        {"a": (20, 80), "b": (3, 15), "c": (4, 18)},
        lambda a, b, c: {"x": a - b, "y": a - b + c, "z": 2 * a - b + c},
        "A bus leaves {town} with {a} passengers. At the first stop, {b} get off; at the second, {c} get on. A second "
        "bus follows with as many passengers as the first had at the start. How many people are in both buses?",
        "After the first stop, the bus has {a} - {b} = {x} passengers, and after the second {x} + {c} = {y}. The "
        "second bus has {a}, as many as the first had at the start. Together: {y} + {a} = {z}.",
    ),
    Template(
        {"a": (2, 9), "b": (3, 9), "c": (5, 20), "d": (2, 6)},
        lambda a, b, c, d: {"x": a * c, "y": b * d, "z": a * c + b * d},
        "A {thing} costs {c} dollars and a box for it {d} dollars. {n} buys {a} of the first and {b} of the second. "
        "How much does {n} pay?",
        "{a} times {c} dollars are {x} dollars, and {b} times {d} dollars are {y} dollars. {n} pays {x} + {y} = {z} "
        "dollars.",
    ),
    Template(
        {"a": (4, 12), "b": (3, 20)},
        lambda a, b: {"x": a * b, "y": a * b + a, "z": b + 1},
        "{n} shares {x} coins fairly among {a} children, and then finds {a} more coins, which are shared too. How "
        "many coins does each child have?",
        "At first each child gets {x} / {a} = {b} coins. The {a} more coins give {a} / {a} = 1 coin each. So each "
        "child has {b} + 1 = {z} coins.",
    ),
    Template(
        {"a": (100, 400), "b": (10, 30), "c": (3, 8)},
        lambda a, b, c: {"x": b * c, "y": a - b * c},
        "A book has {a} pages. {n} reads {b} pages a day. How many pages are left after {c} days?",
        "In {c} days, {n} reads {c} * {b} = {x} pages. Of {a} pages, {a} - {x} = {y} are left.",
    ),
    Template(
        {"a": (5, 30), "b": (2, 12), "c": (2, 12)},
        lambda a, b, c: {"x": a + b, "y": a + b + c, "z": 3 * a + 2 * b + c},
        "{n} is {a} years old. {m} is {b} years older than {n}, and {k} is {c} years older than {m}. How old are the "
        "three of them together?",
        "{m} is {a} + {b} = {x}. {k} is {x} + {c} = {y}. Together they are {a} + {x} + {y} = {z} years old.",
    ),
    # Fractions and ratios.
    Template(
        {"a": (2, 9), "b": (6, 30)},
        lambda a, b: {"x": a * b, "y": a * b - b},
        "A sack holds {x} kilograms of flour. {n} uses 1/{a} of it. How many kilograms are left?",
        "1/{a} of {x} kilograms is {x} / {a} = {b} kilograms. So {x} - {b} = {y} kilograms are left.",
    ),
    Template(
        {"a": (2, 5), "b": (4, 20), "c": (2, 4)},
        lambda a, b, c: {"x": a * b * c, "y": b * c, "r": a * b * c - b * c, "z": (a - 1) * b},
        "{n} has {x} marbles and gives 1/{a} of them to {m}. Then {n} gives the rest in {c} equal parts to {c} "
        "cousins. How many marbles does each cousin get?",
        "{m} gets {x} / {a} = {y} marbles, which leaves {x} - {y} = {r}. Each of the {c} cousins gets {r} / {c} = {z} "
        "marbles.",
    ),
    Template(
        {"a": (2, 7), "b": (3, 8), "c": (4, 25)},
        lambda a, b, c: {"s": a + b, "x": (a + b) * c, "y": a * c, "z": b * c},
        "{n} and {m} share {x} dollars in the ratio {a} to {b}. How much does each of them get?",
        "The ratio has {a} + {b} = {s} parts, and a part is {x} / {s} = {c} dollars. {n} gets {a} * {c} = {y} dollars, "
        "and {m} gets {b} * {c} = {z} dollars.",
    ),
    Template(
        {"a": (2, 6), "b": (2, 9), "c": (3, 12)},
        lambda a, b, c: {"x": b * c, "y": a * c},
        "A recipe for {b} people needs {x} spoons of oil. {n} cooks for {a} people. How many spoons are needed?",
        "Per person the recipe needs {x} / {b} = {c} spoons. For {a} people, {n} needs {a} * {c} = {y} spoons.",
    ),
    Template(
        {"a": (1, 4), "b": (5, 9), "c": (6, 30)},
        lambda a, b, c: {"x": b * c, "y": a * c, "z": (b - a) * c},
        "Of {x} pupils, {a}/{b} walk to school and the others come by bus. How many come by bus?",
        "1/{b} of {x} is {x} / {b} = {c}. So {a} * {c} = {y} pupils walk, and {x} - {y} = {z} come by bus.",
    ),
    Template(
        {"a": (3, 8), "b": (10, 40)},
        lambda a, b: {"x": a * b, "h": 2 * a * b, "z": b},
        "A tank holds {h} liters and is half full. {n} fills buckets of {a} liters from it. How many buckets are "
        "filled before the tank is empty?",
        "Half of {h} liters is {h} / 2 = {x} liters. With {a} liters per bucket, {x} / {a} = {z} buckets are filled.",
    ),
    # Percent and money.
    Template(
        {"p": (1, 9), "c": (2, 40)},
        lambda p, c: {"p": 10 * p, "x": 10 * c, "y": p * c, "z": 10 * c - p * c},
        "A {thing} costs {x} dollars and is reduced by {p}%. What does {n} pay for it now?",
        "{p}% of {x} dollars is {x} * {p} / 100 = {y} dollars. {n} pays {x} - {y} = {z} dollars.",
    ),
    Template(
        {"p": (1, 8), "c": (5, 60), "t": (2, 6)},
        lambda p, c, t: {"x": 100 * c, "y": p * c, "z": p * c * t, "w": 100 * c + p * c * t},
        "{n} lends {m} {x} dollars at {p}% simple interest a year. How much does {m} owe after {t} years?",
        "The interest of one year is {p}% of {x}, which is {y} dollars. After {t} years it is {t} * {y} = {z} dollars, "
        "so {m} owes {x} + {z} = {w} dollars.",
    ),
    Template(
        {"a": (3, 19), "b": (2, 9), "c": (45, 350)},
        lambda a, b, c: {"u": money(c), "x": money(a * c), "y": money(100 * b), "z": money(a * c + 100 * b)},
        "{n} buys {a} tickets at {u} and pays a fee of {y} on top. How much does {n} pay?",
        "The {a} tickets cost {a} * {u} = {x}. With the fee of {y}, {n} pays {x} + {y} = {z}.",
    ),
    Template(
        {"a": (2, 6), "p": (1, 5), "h": (4, 9), "d": (3, 6)},
        lambda a, p, h, d: {"a": 10 * a, "x": 10 * a * h, "y": 10 * a * h * d, "p": 10 * p, "z": (10 - p) * a * h * d},
        "{n} earns {a} dollars an hour, {h} hours a day on {d} days a week. {p}% goes to taxes. What is left per week?",
        "One day brings {h} * {a} = {x} dollars, and {d} days bring {d} * {x} = {y} dollars. After taxes of {p}%, "
        "{y} * (100 - {p}) / 100 = {z} dollars are left.",
    ),
    Template(
        {"a": (11, 60), "b": (2, 9), "c": (5, 15)},
        lambda a, b, c: {"s": a + c, "x": b * (a + c), "y": b * a, "z": b * c},
        "{n} buys {b} pieces of a {thing} at {a} dollars and sells each at {s} dollars. How large is the profit?",
        "{n} pays {b} * {a} = {y} dollars and receives {b} * {s} = {x} dollars. The profit is {x} - {y} = {z} dollars.",
    ),
    Template(
        {"a": (5, 20), "b": (4, 12), "c": (30, 90)},
        lambda a, b, c: {"g": a * b + c, "x": a * b},
        "{n} saves {a} dollars a week for a bicycle of {g} dollars. How much is missing after {b} weeks?",
        "After {b} weeks, {n} has {b} * {a} = {x} dollars. Of {g} dollars, {g} - {x} = {c} dollars are missing.",
    ),
    # Rates: speed, work and flow.
    Template(
        {"a": (30, 110), "b": (2, 9), "c": (10, 90)},
        lambda a, b, c: {"x": a * b, "y": a * b + c},
        "A train from {town} runs for {b} hours at {a} kilometers per hour, then {c} kilometers more. How far is it?",
        "In {b} hours the train covers {b} * {a} = {x} kilometers. In total it covers {x} + {c} = {y} kilometers.",
    ),
    Template(
        {"a": (40, 70), "b": (5, 30), "t": (2, 8)},
        lambda a, b, t: {"f": a + b, "s": 2 * a + b, "d": t * (2 * a + b)},
        "Two cars start {d} kilometers apart and drive towards each other, {n} at {a} and {m} at {f} kilometers per "
        "hour. After how many hours do they meet?",
        "Each hour they come {a} + {f} = {s} kilometers closer. For {d} kilometers they need {d} / {s} = {t} hours.",
    ),
    Template(
        {"a": (3, 12), "b": (4, 15), "c": (2, 9)},
        lambda a, b, c: {"x": a * b, "y": a * b * c},
        "A machine fills {a} bottles a minute. How many bottles do {b} such machines fill in {c} minutes?",
        "{b} machines fill {b} * {a} = {x} bottles a minute. In {c} minutes they fill {c} * {x} = {y} bottles.",
    ),
    Template(
        {"a": (6, 20), "b": (1, 5), "t": (8, 40)},
        lambda a, b, t: {"d": a - b, "v": (a - b) * t},
        "A basin of {v} liters is filled with {a} liters a minute, while {b} liters a minute leak. When is it full?",
        "The basin gains {a} - {b} = {d} liters a minute. It is full after {v} / {d} = {t} minutes.",
    ),
    Template(
        {"a": (2, 8), "d": (3, 12), "b": (2, 4)},
        lambda a, d, b: {"w": a * b * d, "g": a * b, "x": a * b * d, "y": d * b},
        "{g} workers need {d} days for a wall. How many days do {a} workers need?",
        "The wall takes {g} * {d} = {w} days of work. {a} workers need {w} / {a} = {y} days.",
    ),
    Template(
        {"a": (5, 14), "b": (10, 40), "c": (3, 9)},
        lambda a, b, c: {"x": a * c, "y": a * c + b},
        "A plant is {b} centimeters tall and grows {a} centimeters a week. How tall is it after {c} weeks?",
        "In {c} weeks it grows {c} * {a} = {x} centimeters. It is then {b} + {x} = {y} centimeters tall.",
    ),
    # Equations.
    Template(
        {"a": (2, 12), "b": (3, 50), "x": (2, 40)},
        lambda a, b, x: {"y": a * x + b, "d": a * x},
        "{n} thinks of a number, multiplies it by {a}, adds {b} and gets {y}. Which number is it?",
        "Let the number be x. Then {a}x + {b} = {y}, so {a}x = {y} - {b} = {d}, and x = {d} / {a} = {x}.",
    ),
    Template(
        {"x": (5, 60), "d": (2, 30)},
        lambda x, d: {"y": x + d, "s": 2 * x + d, "e": 2 * x},
        "{n} and {m} have {s} stamps together, and {m} has {d} more than {n}. How many does each of them have?",
        "Let {n} have x stamps. Then x + (x + {d}) = {s}, so 2x = {s} - {d} = {e}, and x = {x}. {n} has {x} stamps, "
        "and {m} has {x} + {d} = {y}.",
    ),
    Template(
        {"a": (2, 9), "x": (3, 30), "b": (1, 20)},
        lambda a, x, b: {"c": a + 1, "y": (a + 1) * x, "w": a * x, "z": a * x - b},
        "{n} has {a} times as many cards as {m}. Together they have {y} cards. How many has {n} after losing {b}?",
        "If {m} has x cards, {n} has {a}x, and {a}x + x = {c}x = {y}, so x = {y} / {c} = {x}. {n} has {a} * {x} = {w} "
        "cards, and {w} - {b} = {z} after losing {b} of them.",
    ),
    Template(
        {"a": (3, 40)},
        lambda a: {"c": a + 1, "d": a + 2, "s": 3 * a + 3, "e": 3 * a},
        "Three consecutive numbers add up to {s}. Which numbers are they?",
        "Let the smallest be x. Then x + (x + 1) + (x + 2) = 3x + 3 = {s}, so 3x = {s} - 3 = {e} and "
        "x = {e} / 3 = {a}. The numbers are {a}, {c} and {d}.",
    ),
    Template(
        {"t": (2, 15), "a": (2, 9), "b": (10, 60), "d": (1, 5)},
        lambda t, a, b, d: {"f": a + d, "g": b + d * t, "e": d * t, "x": b + d * t + a * t},
        "Plan A costs {g} dollars and {a} dollars per hour, and plan B costs {b} "
        "dollars and {f} dollars per hour. After how many hours do both cost the same?",
        "The costs are equal when {g} + {a}t = {b} + {f}t, so {d}t = {g} - {b} = {e} and t = {e} / {d} = {t}. "
        "Both cost {g} + {a} * {t} = {x} dollars.",
    ),
    # Geometry and averages.
    Template(
        {"a": (3, 40), "b": (3, 40)},
        lambda a, b: {"x": a * b, "y": 2 * (a + b), "s": a + b},
        "A rectangular yard is {a} meters long and {b} meters wide. What are its area and the length of its border?",
        "The area is {a} * {b} = {x} square meters. The border is 2 * ({a} + {b}) = 2 * {s} = {y} meters long.",
    ),
    Template(
        {"a": (2, 15), "b": (2, 15), "c": (2, 15)},
        lambda a, b, c: {"x": a * b, "y": a * b * c},
        "A crate is {a} decimeters long, {b} wide and {c} high. How many liters does it hold?",
        "Its floor has {a} * {b} = {x} square decimeters. Its volume is {x} * {c} = {y} cubic decimeters, which is {y} "
        "liters.",
    ),
    Template(
        {"m1": (40, 99), "m2": (40, 99), "m3": (40, 99), "u": (40, 99)},
        lambda m1, m2, m3, u: (
            {"s": m1 + m2 + m3, "g": 4 * ((m1 + m2 + m3 + u) // 4), "a": (m1 + m2 + m3 + u) // 4}
            | {"z": 4 * ((m1 + m2 + m3 + u) // 4) - m1 - m2 - m3}
        ),
        "{n} scored {m1}, {m2} and {m3} points in three tests. Which score in the fourth test gives an average of {a}?",
        "Four tests with an average of {a} have 4 * {a} = {g} points. The three tests have {m1} + {m2} + {m3} = {s}. "
        "The fourth needs {g} - {s} = {z} points.",
    ),
    Template(
        {"a": (4, 20), "b": (2, 6)},
        lambda a, b: {"p": 4 * a * b, "s": a * b, "x": a * b * a * b, "t": b * b},
        "A square field has a border of {p} meters. {n} divides it into squares with sides of {a} meters. How many are "
        "there?",
        "Each side of the field is {p} / 4 = {s} meters. Along a side there are {s} / {a} = {b} squares, so there are "
        "{b} * {b} = {t} squares.",
    ),
)
