"""What training costs, measured on this machine.

step.py        one step: time, FLOPs, saved bytes, where its memory goes
process.py     a process of its own that takes such steps and is asked for what they cost
comparison.py  a method against others, their steps taken in turn
plan.py        what fits into a memory, the fastest first
"""
