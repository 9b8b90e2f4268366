"""Residual, RMSNorm and the router's product in one step."""
