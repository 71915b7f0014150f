"""Answers found in generated texts, their normal form, and votes over them."""

import itertools
import time
from fractions import Fraction

import pytest

from dms_jax.errors import ConfigError
from dms_jax.tasks.answer_form import as_fraction, normal_form
from dms_jax.tasks.answers import last_boxed, math_answer
from dms_jax.tasks.registry import TASKS
from dms_jax.tasks.votes import majority_vote, pass_at_k


@pytest.mark.parametrize(
    "text, value",
    [
        ("42", 42),
        ("-7", -7),
        ("+3", 3),
        ("007", 7),
        ("5.", 5),
        ("18.00", 18),
        (".5", Fraction(1, 2)),
        ("-.25", Fraction(-1, 4)),
        ("1,234", 1234),
        ("12,345,678.5", Fraction(24691357, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6/8", Fraction(-3, 4)),
        ("1.5/3", Fraction(1, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac 59", Fraction(5, 9)),
        (r"\frac9{19}", Fraction(9, 19)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        (r"-2\frac12", Fraction(-5, 2)),
        (r"6.72 \times 10^{-5}", Fraction(672, 10**7)),
        (r"3\cdot10^4", 30000),
        ("0", 0),
        ("-0", 0),
    ],
)
def test_as_fraction_is_exact(text, value):
    assert as_fraction(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1, 200",
        "12,34",
        "1,2345",
        "1/0",
        r"\frac{1}{0}",
        "1e5",
        r"\sqrt{2}",
        "2k",
        "52_8",
        "1-2",
        "9" * 5000,
        ".",
        "-",
    ],
)
def test_as_fraction_refuses_other_texts(text):
    assert as_fraction(text) is None


SAME = [
    (
        "0.5",
        ".50",
        "1/2",
        r"\frac12",
        r"$\dfrac{1}{2}$",
        r"\(\tfrac{2}{4}\)",
        "50/100",
        r"x = \frac{1}{2}",
        "**1/2**",
        "0.5.",
    ),
    (
        r"10,\!080",
        "10080",
        "10,080",
        r"\$10,080",
        "$10080$",
        "10080.0",
        "10,080 dollars",
        r"10080\text{ dollars}",
        "10080 dollars per day",
    ),
    (r"90^\circ", "90", r"90^{\circ}", "90°", r"90 \text{ degrees}", "90 degrees", r"90\%", "90%"),
    (r"\text{Evelyn}", "Evelyn", r"\textbf{evelyn}", r"\mbox{Evelyn}."),
    (r"\text{(C)}", "(C)", "C", r"\text{C}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", r"(3, \dfrac{\pi}{2})", r"\left(3,\,\frac\pi2\right)"),
    (r"11\sqrt2", r"11 \sqrt{2}", r"11\sqrt 2"),
    (r"864 \mbox{ inches}^2", "864", r"864\text{ in}^2", r"864\mathrm{ cm}^{2}"),
    ("3, 5, 7", "7,3,5", r"3,\,5,\,7", "5.0, 7, 3"),
    (r"x \in [-2,7]", "[-2, 7]", r"\left[-2,7\right]"),
    ("x^{2}+1", "x^2 + 1"),
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\begin{pmatrix}1/5\\-\frac{18}{5}\end{pmatrix}",
        r"\begin{pmatrix} \frac15\\-18/5 \end{pmatrix}",
    ),
    ("4210_{5}", "4210_5", "$4210_5$"),
]


def test_normal_form_merges_equal_answers_only():
    forms = [{normal_form(answer) for answer in same} for same in SAME]
    assert [len(form) for form in forms] == [1] * len(SAME), [form for form in forms if len(form) > 1]
    for one, other in itertools.combinations(forms, 2):
        assert not one & other


@pytest.mark.parametrize(
    "one, other",
    [
        ("2", "2x"),
        ("2", r"2\pi"),
        ("2", "2 sin x"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "1,2"),
        ("12", "1,2"),
        (r"\sqrt{2}", "2"),
        ("52_8", "52"),
        ("1-2i", "1+2i"),
        ("-3", "3"),
        ("3+2", r"3+2\mathrm{i}"),
        ("0.333", "1/3"),
        ("x^{12}", "x^12"),
        ("y=2x", "y=3x"),
        ("1.5", "15"),
        (r"\frac{1}{2}x", r"\frac{1}{2}"),
        ("100", "1"),
        (r"4210_\text{five}", "4210"),
        ("", "0"),
        (r"\pm 3", "3"),
        (r"10\text{ or }20", "10"),
    ],
)
def test_normal_form_keeps_different_answers_apart(one, other):
    assert normal_form(one) != normal_form(other)


@pytest.mark.parametrize("answer", [answer for same in SAME for answer in same])
def test_normal_form_is_idempotent(answer):
    assert normal_form(normal_form(answer)) == normal_form(answer)


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}.", r"\{1, 2\}"),
        (r"\fbox{x}", None),
        (r"\boxed{\text{a {b} c}} }", r"\text{a {b} c}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed {7}", "7"),
        (r"\fboxed{8}", "8"),
        (r"\boxed{6} put it in \boxed{}", "6"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_last_boxed_is_the_last_one_that_closes(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"So 3, hence \boxed{18}. The answer is 5.", "18"),
        ("9*2 = 18 dollars.\n#### 18\n", "18"),
        ("#### 1,000\nand 7", "1000"),
        ("The answer is 18.", "18"),
        ("The answer is 1. No. The answer is: 2.", "2"),
        ("The final answer is $\\frac{3}{4}$. Done 5.", "3/4"),
        ("Answer: -5", "-5"),
        ("**Answer:** 12 eggs", "12"),
        ("the answer is $18 and Bob has $5.", "18"),
        ("The answer is \\$18.90.", "189/10"),
        ("The answer is $3, 5, 7$.", "3,5,7"),
        ("The answer is 2x + 3. Indeed.", "2x+3"),
        ("The answer is x = 5.", "5"),
        ("The answer is 3.14.", "157/50"),
        ("It costs $1,250.50 in 3 parts or 12.", "12"),
        ("10 - 4 = 6", "6"),
        ("we have 5-3", "3"),
        ("temperature of -3", "-3"),
        ("that is 3/4", "3/4"),
        ("a total of 1,234,567.", "1234567"),
        ("<think>\\boxed{1} no</think>It is 2", "2"),
        ("nothing", ""),
        ("", ""),
    ],
)
def test_math_answer_is_found_in_a_text(text, answer):
    assert math_answer(text) == answer


def test_normal_form_accepts_very_long_answers():
    assert math_answer("1" * 100_000) and math_answer("the answer is " + "1," * 50_000 + "x")


@pytest.mark.parametrize(
    "answers, winner",
    [
        (["a"], 0),
        (["b", "a", "a"], 1),
        (["a", "b", "b", "a"], 0),
        (["", "", "a"], 2),
        (["", ""], 0),
        (["", "b", "a", "b", ""], 1),
    ],
)
def test_majority_vote_elects_the_most_frequent_answer(answers, winner):
    assert majority_vote(answers) == winner


def test_majority_vote_needs_an_answer():
    with pytest.raises(ValueError, match="at least one"):
        majority_vote([])


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_sample(n, c):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_pass_at_k_needs_k_samples():
    for k in (0, 4):
        with pytest.raises(ConfigError, match=rf"pass@{k}.* 3"):
            pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match="3, got 4"):
        pass_at_k(3, 4, 1)


LONG = {
    "braces": "\\boxed{" * 20_000,
    "closed braces": "\\boxed{" * 20_000 + "}" * 20_000,
    "empty boxes": "\\boxed{ }" * 20_000,
    "one box of braces": "\\boxed{" + "{}" * 50_000,
    "digits": "1," * 50_000,
    "groups of digits": "1" + ",234" * 50_000 + "5",
    "a long number": "9" * 100_000,
    "thoughts": "<think>" * 20_000 + "</think>" * 20_000,
    "blanks": " " * 100_000 + "x",
    "answers": "answer is " * 20_000,
    "an answer of blanks": "The answer is" + " " * 100_000,
    "an answer with stars": "The answer is" + " *" * 50_000,
    "an answer: blanks": "answer" + " " * 100_000 + ":" + " " * 100_000,
    "marks": "####" * 20_000 + " " * 100_000,
    "fractions": "\\frac{" * 20_000 + "1}",
    "minuses": "-" * 100_000,
    "dollars": "The answer is $" + "x$1" * 30_000,
    "backslashes": "\\" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_time_is_linear_in_the_length_of_a_text(name):
    """A model that repeats itself writes such texts. Whatever takes quadratic time takes minutes for one of them."""
    start = time.process_time()
    for extract in (last_boxed, math_answer, normal_form, as_fraction, TASKS["gpqa"].extract):
        extract(LONG[name])
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{\boxed{a} b}", "a"),
        (r"\boxed{\boxed{ } b}", r"\boxed{ } b"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"\boxed{a \boxed{b}", "b"),
        (r"} \boxed{a}} {", "a"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{a\\}b}", r"a\\"),
        (r"\fbox{a} \boxed {b} \boxed{}", "b"),
    ],
)
def test_box_ends_at_the_brace_that_closes_it(text, inside):
    assert last_boxed(text) == inside
