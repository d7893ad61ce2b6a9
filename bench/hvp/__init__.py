"""Cost of one Hessian-vector product of one block."""
