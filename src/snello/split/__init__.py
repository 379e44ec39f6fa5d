"""Split learning: one Vision Transformer in two halves, in one process or across a network."""
