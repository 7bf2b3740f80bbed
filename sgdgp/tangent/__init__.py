"""Products with the Jacobian of a network, forward and back, and its feature map."""
