"""The HTML page of an evaluation and its figures.

Begin with `report_page.build`, which reads the measurements and fills in the template `report.html.j2`; the template
holds the words and the tables of the page. `report_figures` draws, and `report_summary` writes the sentences at the
top.
"""
