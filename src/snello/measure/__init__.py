"""What training costs, measured on this machine.

step.py        one step: time, FLOPs, saved bytes, where its memory goes
comparison.py  a method against others, each in a process of its own
plan.py        what fits into a memory, the fastest first
"""
