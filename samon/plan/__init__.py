"""What a step will cost before any GPU is there."""
