"""Products of a kernel matrix with a matrix on the CPU, beside other libraries."""
