"""Split learning: one Vision Transformer in two halves, in one process or across a network.

halves.py       the two halves and their conversation
labels.py       labels as targets, and for the wire
build.py        making them from a model and settings
learner.py      what the training loop drives
store.py        what a server keeps of a frozen client, and draws from it
steps.py        the steps that a client takes with a server's half, and those that follow from the store
traffic.py      exact bytes of an exchange, from shapes
ledger.py       bytes so far, and budgets of bytes
checkpoints.py  the last two checkpoints of one side
flops.py        what each side computes
catalog.py      what `snello codecs` lists
local.py        a session of some steps at a time, in one process
wire/           frames and messages as bytes
security/       certificates, tokens, and finding out what is wrong with them
client/         `snello join`
server/         `snello serve`
"""
