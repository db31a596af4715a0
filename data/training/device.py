"""Where training computes and in which precision."""
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float32    # of the large matrix products
torch.set_float32_matmul_precision("high")
