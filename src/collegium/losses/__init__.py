"""Losses per row, and the block driver that forms their gradients without holding the logits."""
