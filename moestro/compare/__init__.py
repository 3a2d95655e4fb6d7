"""Comparing routers: cells of equal cost, runs over seeds, and what follows from them."""
