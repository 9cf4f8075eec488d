"""What every stage's training has in common: order of rows, learning rates, metrics, checkpoints, interruption, and the
loop of SFT and RM.
"""
