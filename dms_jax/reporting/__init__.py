"""The HTML page of an evaluation and its figures.

Begin with `report_page`; `report_figures` draws, `report_summary` writes the sentences.
"""
