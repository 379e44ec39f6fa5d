"""What a person looks at.

terminal.py  what is printed: results, tables of costs and traffic, the plan, the codecs, a bar
pictures.py  what is drawn: budgets.png, traffic.png
"""
