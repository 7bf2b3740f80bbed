"""What a solve costs, against rows, inputs, columns and processes."""
