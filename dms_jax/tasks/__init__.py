"""Problems with reference answers: needles, variables, mathematics, code.

Begin with `problem` (what a task provides) and `registry` (all tasks by name).
"""
