"""Split learning: one Vision Transformer in two halves, with a codec and counted bytes between them."""
