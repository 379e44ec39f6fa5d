"""What a person looks at.

terminal.py      what is printed: results, tables of costs and traffic, the plan, the codecs, a bar
pictures.py      what is drawn as PNG: budgets.png, traffic.png
page.py          report.html: one file that opens anywhere, from the files of a run folder
side_by_side.py  the same for several runs
facts.py         what a run folder says, read once
sections/        what each part of the page says; templates/ how it looks
charts.py        lines and heat maps as SVG
words.py         how numbers read
"""
