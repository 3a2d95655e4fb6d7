"""Routing: which experts a token goes to, how they are kept equally busy, and what the loads show."""
