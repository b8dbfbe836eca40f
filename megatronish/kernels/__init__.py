"""One file per op: the reference in plain PyTorch first, then the op that torch.library knows, then the public function."""
