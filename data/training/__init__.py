"""The recipe of the shipped model in PyTorch, for one GPU: `python data/train_torch.py`. Nothing here is imported by
minillama; it is not needed to use the model."""
