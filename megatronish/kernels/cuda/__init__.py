"""C++/CUDA implementations of ops: host functions over megatronish._cuda (csrc/cuda)."""
