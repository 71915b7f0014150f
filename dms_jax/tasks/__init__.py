"""Tasks with reference answers: needles, variable tracking, copying, recall, mathematics, multiple choice, code.

Begin with `problem`, which says what a task provides, and `registry`, which has all tasks by name and is the only file
to edit when a task is added.
"""
