"""Problems with reference answers: needles, variable tracking, copying, recall, mathematics, multiple choice, code.

Begin with `problem` (what a task provides) and `registry` (all tasks by name, and the only place to edit when a task is
added).
"""
