"""CPU kernels: C++ compiled at first use, called on raw pointers."""
