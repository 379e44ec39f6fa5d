"""What a run leaves behind, written and read in one place.

folder.py      `RunFolder`: which file is what; the settings and the model of a run, read back
resolved.py    `Resolved`: what was decided from model, data and machine
summary.py     `Summary`: what came out
checkpoint.py  weights, optimizers and state in one file
lock.py        one process at a time
"""
