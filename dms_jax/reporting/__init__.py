"""The HTML page of an evaluation and its figures.

Begin with `report_page.build`: it reads the measurements and fills in the template `report.html.j2`, where the words and tables of
the page are. `report_figures` draws, `report_summary` writes the sentences at the top.
"""
