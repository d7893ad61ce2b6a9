"""Hessian-vector products by a traced and linearized gradient: trace -> linearize -> program -> engine."""
