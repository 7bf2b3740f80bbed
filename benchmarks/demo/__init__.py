"""The demonstration: 20,000 points with a gap, against the truth and Cholesky."""
