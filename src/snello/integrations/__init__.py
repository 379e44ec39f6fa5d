"""ALaST as a callback of other people's training loops.

attachment.py    what the callbacks share
transformers.py  `ALaSTCallback` for `transformers.Trainer`: pip install 'snello[hf]'
lightning.py     `ALaSTCallback` for `lightning.Trainer`: pip install 'snello[lightning]'

Each host is imported with its module, and nowhere else.
"""
