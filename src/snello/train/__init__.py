"""Training: one loop for every method, and what it is made of.

loop.py      `Trainer`: steps, evaluations, checkpoints
place.py     where a run lives: its folder and checkpoints, model and learner
learner.py   what the loop drives: how a micro-step makes gradients, and how they become an update
schedule.py  which pictures, steps and learning rates a run has
optim.py     parameter groups, learning rates
scoring.py   how good a model is on labelled pictures
ranks.py     several processes that train one model
signals.py   Ctrl-C and SIGTERM
display.py   progress bar, warnings
tracking.py  TensorBoard, W&B, MLflow
"""
