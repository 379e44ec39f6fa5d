"""Pictures made of text: SVG that stands in a page by itself, without anything that draws.

tokens.py  a picture and what has become of its patches
"""
