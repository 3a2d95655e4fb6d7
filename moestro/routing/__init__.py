"""The heart: which experts a token goes to, how they are kept equally busy, what the loads tell."""
