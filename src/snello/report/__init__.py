"""What a person looks at.

terminal.py  results and tables
pictures.py  budgets.png, traffic.png
"""
