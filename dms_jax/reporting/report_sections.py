"""The sections of a report: what is shown of each kind of measurement, and the words around it. None without measurements."""

from typing import NamedTuple

from dms_jax.evaluation.aggregate import AnswerArm, GreedyArm, KeptArm, TextGroup
from dms_jax.reporting import report_figures as figures
from dms_jax.reporting import report_page as page


class Section(NamedTuple):
    html: str
    pngs: dict[str, bytes]  # file name -> content


def text_section(groups: list[TextGroup]) -> Section | None:
    if not groups:
        return None
    words = (
        "Every policy reads the same rows, a few tokens at a time, and predicts each next token. Methods that rank pairs do so after each chunk "
        "of tokens (--chunk of infer.evaluate). KL(dense || policy) says how far a prediction is from the dense model's: 0 is the same, 1 a very "
        "different one. The nearest first. Intervals: 95%, bootstrap over rows."
    )
    if any(arm.policy == "quest" for group in groups for arm in group.arms):
        words += " quest keeps all pairs and reads its budget of them at each step: it saves reading, not memory."
    drawn = {}
    if any(arm.policy != "dense" for group in groups for arm in group.arms):
        drawn = {
            figures.kl_tails(
                groups
            ): "KL tails: for each value of KL, the fraction of tokens that are farther from the dense model than that. "
            "Lower and further left is better; both axes are logarithmic. A mean hides the rare tokens that a policy gets badly wrong: they are at "
            "the right end of its line.",
            figures.kl_by_position(
                groups
            ): "Mean KL in 16 equal stretches of the row. The dotted line is the budget: until then nothing has to be "
            "forgotten. The axis is linear below 0.001 and logarithmic above.",
        }
    return _section("Text: distance from the dense model", [page.paragraph(words), page.text_tables(groups)], drawn)


def answer_section(arms: list[AnswerArm]) -> Section | None:
    if not arms:
        return None
    words = (
        "The policy reads a prompt and answers under its budget. Each point is a policy under one budget, at the live tokens it really "
        "held; up and left is better. Intervals: 95%, Wilson, over problems."
    )
    caption = (
        "Accuracy on each task against live tokens per KV head at the end of the answer, mean over problems. The budgets of a policy are joined. "
        "The dotted line is the dense model."
    )
    drawn = {figures.accuracy(arms): caption}
    return _section("Answers: accuracy against live tokens", [page.paragraph(words)], drawn, [page.answer_tables(arms)])


def needle_section(arms: list[AnswerArm]) -> Section | None:
    tasks = list(dict.fromkeys(arm.task for arm in arms if arm.cells))
    if not tasks:
        return None
    words = (
        "A fact is hidden in a long text, at a depth of 0% (its beginning) to 100% (just before the question), then asked for. "
        "1 is always found, 0 never."
    )
    caption = "accuracy by length of the prompt and depth of the needle, one map for each policy and budget, with its mean. Empty: not measured."
    drawn = {figures.needles(task, arms): f"{task}: {caption}" for task in tasks}
    return _section("Needles: found by length and depth", [page.paragraph(words)], drawn)


def greedy_section(arms: list[GreedyArm]) -> Section | None:
    if not arms:
        return None
    words = (
        "The policy and the dense model continue the same text greedily. After the first different token they go their own ways, so the fraction "
        "of equal tokens says how soon that happens, not how good the text is. Intervals: 95%, bootstrap over texts."
    )
    return _section("Greedy continuations", [page.paragraph(words), page.greedy_tables(arms)], {})


def kept_section(arms: list[KeptArm]) -> Section | None:
    if not arms:
        return None
    words = "Each KV head of each layer decides for itself what to forget, so their caches differ in size."
    drawn = {
        figures.cr_by_head(
            arms
        ): "Realised compression ratio (tokens / live tokens at the end of the row) of each KV head, with that of the whole "
        "layer beside it. The dotted line is dense, CR 1.",
        figures.cr_by_position(
            arms
        ): "Live tokens per KV head, mean over layers, heads and rows, as the text is read (left), and the compression "
        "ratio so far (right). Dotted: dense.",
    }
    colored = (
        "The text in colour. The stronger a token's background, the more heads still hold it at the end of the text. "
        "Hover a token for its position and number."
    )
    texts = [page.kept_text(arm, is_open=index == 0) for index, arm in enumerate(arms)]
    section = _section(
        "What DMS keeps", [page.paragraph(words)], drawn, [page.paragraph(colored), page.kept_key(), *texts]
    )
    pngs = {
        f"kept_text_{index}.png": figures.kept_text(arm, f"{arm.domain}, {arm.name}")
        for index, arm in enumerate(arms, 1)
    }
    return Section(section.html, section.pngs | pngs)


def _section(
    title: str, before: list[str], drawn: dict[figures.Drawing, str], after: list[str] | None = None
) -> Section:
    shown = [page.drawing(figure, caption) for figure, caption in drawn.items()]
    return Section(
        page.section(title, *before, *shown, *(after or [])), {f"{figure.name}.png": figure.png for figure in drawn}
    )
